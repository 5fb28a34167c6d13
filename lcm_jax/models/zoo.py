"""The models known by name: one row of sizes each."""

import dataclasses

from lcm_jax.models.clip import TextSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes of a whole text-to-image model."""

    unet: UNetSpec
    vae: VAESpec
    text: tuple[TextSpec, ...]  # text encoders, in the order their outputs are joined
    resolution: int  # px, that it was trained at
    prediction_type: str = 'epsilon'


CLIP_L = TextSpec(width=768, layers=12, heads=12, mlp=3072)
OPENCLIP_H = TextSpec(width=1024, layers=23, heads=16, mlp=4096, act='gelu')  # less its last layer
OPENCLIP_BIG_G = TextSpec(width=1280, layers=32, heads=20, mlp=5120, act='gelu', projection=1280)

SD15 = UNetSpec(
    widths=(320, 640, 1280, 1280),
    down=((1, 1), (1, 1), (1, 1), (0, 0)),
    mid=1,
    up=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    heads=(8, 8, 8, 8),
    context_dim=768,
)
SDXL = UNetSpec(
    widths=(320, 640, 1280),
    down=((0, 0), (2, 2), (10, 10)),
    mid=10,
    up=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    heads=(5, 10, 20),
    context_dim=2048,
    linear_proj=True,
    size_dim=256,
    pooled_dim=1280,
)
SDXL_VAE = VAESpec(scaling_factor=0.13025)

MODELS = {
    'sd15': ModelSpec(SD15, VAESpec(), (CLIP_L,), 512),
    'sd21': ModelSpec(
        dataclasses.replace(SD15, heads=(5, 10, 20, 20), context_dim=1024, linear_proj=True),
        VAESpec(),
        (OPENCLIP_H,),
        768,
        'v_prediction',
    ),
    'sdxl': ModelSpec(SDXL, SDXL_VAE, (CLIP_L, OPENCLIP_BIG_G), 1024),
    'ssd1b': ModelSpec(
        dataclasses.replace(
            SDXL, down=((0, 0), (2, 2), (4, 4)), mid=None, up=((4, 4, 10), (2, 1, 1), (0, 0, 0))
        ),
        SDXL_VAE,
        (CLIP_L, OPENCLIP_BIG_G),
        1024,
    ),
}

# Hub ids of models that are such a row.
PUBLISHED = {
    'stable-diffusion-v1-5/stable-diffusion-v1-5': 'sd15',
    'runwayml/stable-diffusion-v1-5': 'sd15',
    'CompVis/stable-diffusion-v1-4': 'sd15',
    'Lykon/dreamshaper-7': 'sd15',
    'stabilityai/stable-diffusion-2-1': 'sd21',
    'stabilityai/stable-diffusion-xl-base-1.0': 'sdxl',
    'segmind/SSD-1B': 'ssd1b',
}
