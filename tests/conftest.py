"""Pipeline folders that the tests share, and the fixtures that keep tests apart."""

import numpy as np
import pytest
import torch

from lcm_jax.data import EMOJI


def randomise(model, seed):
    """Every parameter at random, norms and biases too, such that activations stay of order one."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            value = 0.2 * rng.normal(size=p.shape) + ('norm' in name and name.endswith('weight'))
        else:
            value = rng.normal(size=p.shape) / np.sqrt(p[0].numel())
        p.data = torch.tensor(value, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope='session')
def random_folder(tmp_path_factory):
    """A complete tiny Stable Diffusion of random weights, written by diffusers: 32 px, emoji tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(EMOJI / 'pipeline' / 'tokenizer'))
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=4,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), cross_attention_dim=32, norm_num_groups=8)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
        down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3)
    scheduler = DDIMScheduler(
        beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, timestep_spacing='leading')
    folder = tmp_path_factory.mktemp('random') / 'pipeline'
    StableDiffusionPipeline(
        randomise(vae, 0), randomise(text, 1), tokenizer, randomise(unet, 2), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder
