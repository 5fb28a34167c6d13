"""Small random models of each family, written to disk as diffusers writes them."""

import dataclasses
import json
import math

import numpy as np

from lcm_jax import single, weights
from lcm_jax.checkpoint import COMPONENTS, INDEX, SCHEDULER, open_folder
from lcm_jax.models import configs
from lcm_jax.models.clip import TextSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec
from lcm_jax.models.zoo import ModelSpec
from lcm_jax.tensors import Tensor
from lcm_jax.text import Tokenizer

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


def random_tensors(abstract, rng, dtype):
    """{key: Tensor} for a component: kernels of variance 1 / fan-in, norms around one."""
    pool = rng.standard_normal(2**20 + 3, np.float32)  # a prime; each tensor starts elsewhere in it

    def tensor(key, shape):
        start, ones = int(rng.integers(len(pool))), 'norm' in key and key.endswith('weight')
        scale = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5

        def read():
            return (np.resize(np.roll(pool, start), shape) * scale + ones).astype(dtype)

        return Tensor(key, shape, np.dtype(dtype), read)

    return {key: tensor(key, shape) for key, shape in weights.keys(abstract).items()}


def write_model(folder, spec, dtype=np.float16, tokenizers=True, keep=True):
    """A diffusers folder with random weights -> {component: {key: array}}, if it is to `keep` them."""
    rng, side = np.random.default_rng(0), spec.resolution // 8
    described = {
        'unet': configs.unet_config(spec.unet, side),
        'vae': configs.vae_config(spec.vae, spec.resolution),
    }
    for name, text in zip(('text_encoder', 'text_encoder_2'), spec.text, strict=False):
        described[name] = configs.text_config(text)
    texts = {INDEX: single.index(described)}
    texts[SCHEDULER] = single.scheduler(described, spec.prediction_type, False)
    texts |= {f'{name}/config.json': config for name, config in described.items()}
    texts = {path: json.dumps(x, indent=2) + '\n' for path, x in texts.items()}
    for name in ('tokenizer', 'tokenizer_2')[: len(spec.text) * tokenizers]:
        tokenizer = Tokenizer.clip(single.pad(single.layout_for(described), name))
        texts |= {f'{name}/{file}': text for file, text in tokenizer.texts().items()}
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    out, ckpt = {}, open_folder(folder)
    for name in described:
        tensors = random_tensors(ckpt.shapes(name), rng, dtype)
        weights.write_tensors(folder / name / COMPONENTS[name][0], tensors)
        out[name] = {key: np.asarray(x) for key, x in tensors.items()} if keep else None
    return out
