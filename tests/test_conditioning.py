"""Sizes, guidance and pictures as diffusers passes them to its networks."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from lcm_jax import conditioning, images


def test_micro_conditioning_has_heights_first():
    sizes = conditioning.micro_conditioning((1, 2), (3, 4), (5, 6))
    assert sizes.tolist() == [1, 2, 3, 4, 5, 6] and sizes.dtype == np.float32

    class Theirs(diffusers.StableDiffusionXLPipeline):
        def __init__(self):
            self.unet = torch.nn.Module()
            self.unet.config = type('Config', (), {'addition_time_embed_dim': 8})
            self.unet.add_embedding = torch.nn.Module()
            self.unet.add_embedding.linear_1 = torch.nn.Linear(12 + 6 * 8, 1)

    original, crop, target = (768, 1024), (0, 128), (512, 640)  # (height, width), (top, left)
    theirs = Theirs._get_add_time_ids(
        Theirs(), original, crop, target, torch.float32, text_encoder_projection_dim=12
    )
    ours = conditioning.micro_conditioning(original, crop, target)
    np.testing.assert_array_equal(ours, theirs[0])
    with pytest.raises(ValueError, match='sizes'):
        conditioning.micro_conditioning((1, 2, 3), (0, 0), (1, 2))


@pytest.mark.parametrize('dim', [8, 9, 256])
def test_guidance_embedding(dim):
    w = np.array([0.0, 1.5, 7.0], np.float32)
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor(w), embedding_dim=dim
    )
    ours = conditioning.guidance_embedding(jnp.asarray(w), dim)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # sin and cos of thousands in float32
    np.testing.assert_allclose(ours[0], theirs[0])


@pytest.mark.parametrize('shape', [(41, 29), (41, 29, 3)])
def test_pictures_and_masks_are_prepared_as_diffusers_does(shape):
    numbers = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image, (height, width) = Image.fromarray(numbers), (24, 32)
    processor = VaeImageProcessor(vae_scale_factor=8)
    theirs = processor.preprocess(image.convert('RGB'), height, width)
    ours = images.picture(images.rgb(image), (height, width))
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0), atol=1e-6)

    processor = VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    theirs = processor.preprocess(image, height, width)
    ours = images.mask(images.rgb(image), (height, width))
    np.testing.assert_array_equal(ours, theirs[0].permute(1, 2, 0))
    assert 0.2 < ours.mean() < 0.8
    small = torch.nn.functional.interpolate(theirs, size=(3, 4))
    np.testing.assert_array_equal(images.shrink(ours, 8), small[0].permute(1, 2, 0))
