"""LoRA as functions on parameters: W -> W + scale * down @ up (arXiv 2106.09685). Knows no model.

An adapter is {kernel path: {'down': [..., in, r], 'up': [1.., r, out]}}; the spatial axes of a
convolution lead, as in its kernel. File scales (alpha / r) are baked into `up` when a file is read.
"""

import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.errors import InputError
from lcm_jax.tree import map_named, named

# The modules that LCM-LoRA adapts (diffusers train_lcm_distill_lora_sd_wds.py).
LCM_TARGETS = (
    r'(.*[/.])?(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|'
    r'conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)/kernel'
)


def init(key, params, rank, targets=LCM_TARGETS):
    """Adapter for every kernel of `params` whose path matches `targets`, neutral at first (up = 0).

    params may be abstract; targets is a regex of the whole path. `down` is uniform in
    +-1/sqrt(fan_in), as PEFT draws it (kaiming_uniform with a = sqrt(5)); factors are float32.
    Raises InputError if nothing matches.
    """
    shapes = {path: w.shape for path, w in named(params) if re.fullmatch(targets, path)}
    if not shapes:
        raise InputError(f'no parameter matches the LoRA targets {targets!r}')
    fan_in = [math.prod(shape[:-1]) for shape in shapes.values()]

    @jax.jit  # and one draw for all: drawing module by module compiles a program for each shape
    def draw(key):
        flat = jax.random.uniform(key, (rank * sum(fan_in),), minval=-1, maxval=1)
        parts = jnp.split(flat, [rank * n for n in itertools.accumulate(fan_in)][:-1])
        return {
            path: {
                'down': n**-0.5 * part.reshape(*shape[:-1], rank),
                'up': jnp.zeros((*(1,) * (len(shape) - 2), rank, shape[-1])),
            }
            for (path, shape), n, part in zip(shapes.items(), fan_in, parts, strict=True)
        }

    return draw(key)


def delta(ab):
    """{'down', 'up'} -> the full update, shaped like the kernel."""
    return ab['down'] @ ab['up']


def merge(params, lora, scale=1.0):
    """Parameters with `scale` times the updates added; same tree as `params`.

    For sampling and export. Raises InputError if the adapter has a path that `params` lacks.
    """
    strange = sorted(lora.keys() - {path for path, _ in named(params)})
    if strange:
        raise InputError(
            f'{len(strange)} of {len(lora)} adapted modules are not in the model: '
            f'{", ".join(strange[:3])}'
        )
    return map_named(
        lambda path, w: w + (scale * delta(lora[path])).astype(w.dtype) if path in lora else w,
        params,
    )


def apply(fn, lora, scale=1.0):
    """`fn` with y += scale * (x down) up after every adapted Dense or Conv; forms no down up.

    For training: gradients reach only the low-rank factors, and no full-size gradient is built.
    """

    def intercept(call, args, kwargs, ctx):
        y = call(*args, **kwargs)
        ab = lora.get('/'.join((*ctx.module.path, 'kernel')))
        if ab is None or ctx.method_name != '__call__':
            return y
        down, up = ab['down'].astype(y.dtype), (scale * ab['up']).astype(y.dtype)
        # The layer itself with its r features: the same stride and padding, Dense and Conv alike.
        low = ctx.module.clone(features=down.shape[-1], use_bias=False, name=None, parent=None)
        h = low.apply({'params': {'kernel': down}}, args[0].astype(y.dtype))
        return y + h @ up.reshape(up.shape[-2:])

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        with nn.intercept_methods(intercept):
            return fn(*args, **kwargs)

    return wrapped
