"""LoRA files as other programs write them: peft's names, through diffusers' own conversions."""

import functools
import re

import numpy as np
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import state_dict_utils as names

from lcm_jax import lora, weights
from lcm_jax.models import shapes
from lcm_jax.models.zoo import MODELS
from lcm_jax.original import unet_modules
from lcm_jax.tree import named

TEXT_TARGETS = r'.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)/kernel'
TARGETS = {
    'unet': lora.LCM_TARGETS,
    **dict.fromkeys(('text_encoder', 'text_encoder_2'), TEXT_TARGETS),
}


@functools.cache
def full_size(model):
    """A row of the zoo -> {component: parameters as shapes}."""
    spec = MODELS[model]
    texts = {
        f'text_encoder{"_2" if i else ""}': shapes.text_shapes(s) for i, s in enumerate(spec.text)
    }
    return {'unet': shapes.unet_shapes(spec.unet), **texts}


def adapted(models, targets=TARGETS):
    """{component: parameters} -> [(component, path, module, shape in the checkpoint)]."""
    for component, params in models.items():
        for path, w in named(params):
            if path.endswith('/kernel') and re.fullmatch(targets[component], path):
                key, perm = weights.theirs(path, w.ndim)
                yield component, path, key.removesuffix('.weight'), [w.shape[i] for i in perm]


def peft(models, rank=1, dtype=np.float32, seed=0, targets=TARGETS):
    """Random factors of every adapted module, under the keys that diffusers writes today."""
    rng = np.random.default_rng(seed)
    out = {}
    for component, _, module, (n_out, *n_in) in adapted(models, targets):
        for leaf, shape in (('A', (rank, *n_in)), ('B', (n_out, rank, *[1] * len(n_in[1:])))):
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
            out[f'{component}.{module}.lora_{leaf}.weight'] = value.astype(dtype)
    return out


def _each(unet, text):
    """A dialect from functions on the peft keys of the UNet and of the text encoders."""

    def dialect(tensors):
        return {(unet if k.startswith('unet.') else text)(k): x for k, x in tensors.items()}

    return dialect


def _replaced(*pairs):
    return functools.partial(functools.reduce, lambda key, pair: re.sub(*pair, key), pairs)


def kohya(tensors):
    return {k: np.asarray(x) for k, x in names.convert_state_dict_to_kohya(tensors).items()}


def kohya_sgm(tensors):
    """As kohya's SDXL trainer: the blocks of the original UNet."""
    modules = [k.split('.lora_')[0].removeprefix('unet.') for k in tensors if k.startswith('unet.')]
    new = {f'unet.{module}': f'unet.{name}' for module, name in unet_modules(modules).items()}

    def key(k):
        module, leaf = k.split('.lora_')
        return f'{new.get(module, module)}.lora_{leaf}'

    return kohya({key(k): x for k, x in tensors.items()})


middle = _each(
    _replaced((r'\.lora_A\.', '.lora.down.'), (r'\.lora_B\.', '.lora.up.')),
    _replaced(
        (r'\.lora_A\.', '.lora_linear_layer.down.'), (r'\.lora_B\.', '.lora_linear_layer.up.')
    ),
)
old = _each(
    _replaced(
        (r'(attn\d)\.to_(q|k|v|out)(\.0)?\.lora_A', r'\1.processor.to_\2_lora.down'),
        (r'(attn\d)\.to_(q|k|v|out)(\.0)?\.lora_B', r'\1.processor.to_\2_lora.up'),
        (r'\.lora_A\.', '.lora.down.'),
        (r'\.lora_B\.', '.lora.up.'),
    ),
    _replaced(
        (r'self_attn\.(\w+)_proj\.lora_A', r'self_attn.to_\1_lora.down'),
        (r'self_attn\.(\w+)_proj\.lora_B', r'self_attn.to_\1_lora.up'),
        (r'\.lora_A\.', '.lora_linear_layer.down.'),
        (r'\.lora_B\.', '.lora_linear_layer.up.'),
    ),
)
raw = _each(
    _replaced((r'^unet\.', 'base_model.model.')), _replaced((r'^(\w+)\.', r'\1.base_model.model.'))
)
DIALECTS = {
    'kohya': kohya,
    'kohya-sgm': kohya_sgm,
    'peft': dict,
    'peft-raw': raw,
    'diffusers': middle,
    'diffusers-old': old,
    # what diffusers' LCM-LoRA script for SDXL saves
    'mixed': names.convert_state_dict_to_diffusers,
}


def undone(tensors, config):
    """A file's tensors -> the peft keys that diffusers itself makes of them."""
    if any(k.startswith('lora_') for k in tensors):
        tensors = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), config)
        alphas = {k: torch.tensor(x) if k.endswith('alpha') else x for k, x in tensors.items()}
        tensors, _ = _convert_non_diffusers_lora_to_diffusers(alphas)
    unet = {k: x for k, x in tensors.items() if k.startswith('unet.')}
    text = {k: x for k, x in tensors.items() if not k.startswith('unet.')}
    if text:
        text = names.convert_state_dict_to_peft(names.convert_state_dict_to_diffusers(text))
    return names.convert_unet_state_dict_to_peft(unet) | text
