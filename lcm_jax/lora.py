"""LoRA as functions on parameters: W -> W + scale * down @ up (arXiv 2106.09685). Knows no model.

An adapter is {kernel path: {'down': [..., in, r], 'up': [1.., r, out]}}; the spatial axes of a
convolution lead, as in its kernel. File scales (alpha / r) are baked into `up` when a file is read.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.errors import InputError
from lcm_jax.tree import map_named, matches, named

# The modules that LCM-LoRA adapts (diffusers train_lcm_distill_lora_sd_wds.py).
LCM_TARGETS = (
    r'(.*[/.])?(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|'
    r'conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)/kernel'
)


def ranks(params, rows):
    """Rows (regex of whole paths, rank, alpha) -> {path: (rank, alpha)} of the kernels they adapt.

    The first row that matches counts; rank 0 leaves its kernels alone. params may be abstract.
    Raises InputError if nothing is adapted, and for a row that no kernel matches.
    """
    found, used = {}, set()
    for path, w in named(params):
        row = next((i for i, (regex, *_) in enumerate(rows) if matches(regex, path)), None)
        used.add(row)
        if row is not None and rows[row][1] and w.ndim > 1:
            found[path] = tuple(rows[row][1:])
    unused = [regex for i, (regex, *_) in enumerate(rows) if i not in used]
    if unused or not found:
        raise InputError(f'no parameter matches the LoRA targets {(unused or [rows])[0]!r}')
    return found


def init(key, params, rank, targets=LCM_TARGETS):
    """Adapter for every kernel of `params` whose path matches `targets`, neutral at first (up = 0).

    params may be abstract; targets is a regex of the whole path, and rank one for all; or rank is
    {path: (rank, alpha)} as `ranks` gives it. `down` is uniform in +-1/sqrt(fan_in), as PEFT draws
    it (kaiming_uniform with a = sqrt(5)); factors are float32. Raises InputError if nothing matches.
    """
    chosen = rank if isinstance(rank, dict) else ranks(params, ((targets, rank, rank),))
    shapes = {path: w.shape for path, w in named(params) if path in chosen}
    fan_in = {path: math.prod(shape[:-1]) for path, shape in shapes.items()}
    sizes = [chosen[path][0] * n for path, n in fan_in.items()]

    @jax.jit  # and one draw for all: drawing module by module compiles a program for each shape
    def draw(key):
        flat = jax.random.uniform(key, (sum(sizes),), minval=-1, maxval=1)
        parts = jnp.split(flat, [*itertools.accumulate(sizes)][:-1])
        return {
            path: {
                'down': n**-0.5 * part.reshape(*shapes[path][:-1], chosen[path][0]),
                'up': jnp.zeros((*(1,) * len(shapes[path][2:]), chosen[path][0], shapes[path][-1])),
            }
            for (path, n), part in zip(fan_in.items(), parts, strict=True)
        }

    return draw(key)


def delta(ab):
    """{'down', 'up'}, or {'full'} -> the full update, shaped like the kernel."""
    return ab['full'] if 'full' in ab else ab['down'] @ ab['up']


def add(w, updates):
    """Kernel, [(update as `delta` takes it, scale)] -> the kernel plus the sum of both's products.

    In numpy or jax. The sum is taken in float32, whatever the kernel's dtype.
    """
    total = sum(scale * delta(ab).astype(jnp.float32) for ab, scale in updates)
    return (w.astype(jnp.float32) + total).astype(w.dtype)


_add = jax.jit(add)  # a small program for each shape: seconds less to compile than one for all


def updates_of(path, terms):
    """[(adapter, scale)] -> what of them goes to this kernel, as `add` takes it."""
    return [(adapter[path], scale) for adapter, scale in terms if path in adapter]


def merge(params, terms):
    """Parameters, [(adapter, scale)] -> the parameters with all updates added, see `add`.

    For sampling and export. What no adapter touches is shared with `params`. Raises InputError if one
    has a path that `params` lacks.
    """
    adapted = {path for adapter, _ in terms for path in adapter}
    strange = sorted(adapted - {path for path, _ in named(params)})
    if strange:
        raise InputError(
            f'{len(strange)} of {len(adapted)} adapted modules are not in the model: '
            f'{", ".join(strange[:3])}'
        )

    def merged(path, w):
        updates = updates_of(path, terms)
        return _add(w, updates) if updates else w

    return map_named(merged, params)


def apply(fn, lora, scale=1.0):
    """`fn` with y += scale * (x down) up after every adapted Dense or Conv; forms no down up.

    For training: gradients reach only the low-rank factors, and no full-size gradient is built.
    scale: one for all modules, or {path: scale}.
    """

    def intercept(call, args, kwargs, ctx):
        y = call(*args, **kwargs)
        path = '/'.join((*ctx.module.path, 'kernel'))
        ab, by = lora.get(path), scale.get(path) if isinstance(scale, dict) else scale
        if ab is None or ctx.method_name != '__call__':
            return y
        down, up = ab['down'].astype(y.dtype), (by * ab['up']).astype(y.dtype)
        # The layer itself with its r features: the same stride and padding, Dense and Conv alike.
        low = ctx.module.clone(features=down.shape[-1], use_bias=False, name=None, parent=None)
        h = low.apply({'params': {'kernel': down}}, args[0].astype(y.dtype))
        return y + h @ up.reshape(up.shape[-2:])

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        with nn.intercept_methods(intercept):
            return fn(*args, **kwargs)

    return wrapped
