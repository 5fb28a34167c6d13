"""Sizes of small models of each family."""

import dataclasses

from lcm_jax.models.clip import TextSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec
from lcm_jax.models.zoo import ModelSpec

# Widths are multiples of 64 and of the 32 groups, as in all published models.
CLIP = TextSpec(width=64, layers=2, heads=1, mlp=96, vocab=99)
OPEN_CLIP = TextSpec(width=128, layers=3, heads=2, mlp=160, act='gelu', vocab=99)
UNET = UNetSpec(
    widths=(64, 128),
    down=((1, 1), (0, 0)),
    mid=1,
    up=((0, 0, 0), (1, 1, 1)),
    heads=(8, 8),
    context_dim=64,
)
VAE = VAESpec(widths=(32, 64), resnets=2)
XL = dataclasses.replace(
    UNET,
    down=((0, 0), (2, 2)),
    mid=2,
    up=((2, 2, 2), (0, 0, 0)),
    heads=(1, 2),
    context_dim=192,
    linear_proj=True,
    size_dim=256,
    pooled_dim=72,
)
XL_VAE = dataclasses.replace(VAE, scaling_factor=0.13025)
XL_TEXT = CLIP, dataclasses.replace(OPEN_CLIP, projection=72)
SD2 = dataclasses.replace(UNET, heads=(1, 2), context_dim=128, linear_proj=True)
MODELS = {
    'sd1': ModelSpec(UNET, VAE, (CLIP,), 512),
    'inpainting': ModelSpec(dataclasses.replace(UNET, in_channels=9), VAE, (CLIP,), 512),
    'lcm': ModelSpec(dataclasses.replace(UNET, w_dim=32), VAE, (CLIP,), 512),
    'sd2': ModelSpec(SD2, VAE, (OPEN_CLIP,), 512),
    'sdxl': ModelSpec(XL, XL_VAE, XL_TEXT, 1024),
    'ssd1b': ModelSpec(
        dataclasses.replace(XL, mid=None, down=((0, 0), (2, 2)), up=((2, 2, 3), (0, 1, 0))),
        XL_VAE,
        XL_TEXT,
        1024,
    ),
}
