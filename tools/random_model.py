"""A model of given sizes with random weights, written as diffusers writes it: for tests and benchmarks.

    python tools/random_model.py sdxl OUT [--dtype float16]

writes a row of lcm_jax.models.zoo (SDXL: 7 GB in half precision).
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from lcm_jax import single, weights
from lcm_jax.checkpoint import COMPONENTS, INDEX, SCHEDULER, open_folder
from lcm_jax.models import configs
from lcm_jax.models.zoo import MODELS
from lcm_jax.tensors import Tensor, write_tensors
from lcm_jax.text import Tokenizer


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
        write_tensors(folder / name / COMPONENTS[name][0], tensors)
        out[name] = {key: np.asarray(x) for key, x in tensors.items()} if keep else None
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', choices=MODELS)
    parser.add_argument('out', type=Path)
    parser.add_argument('--dtype', default='float16', choices=('float16', 'float32'))
    args = parser.parse_args()
    write_model(args.out, MODELS[args.model], np.dtype(args.dtype), keep=False)


if __name__ == '__main__':
    main()
