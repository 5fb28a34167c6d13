"""Parameter trees as shapes only (ShapeDtypeStructs): what a checkpoint must hold, known without weights.

Linen infers widths from inputs, so each function passes the smallest ones that fit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lcm_jax.models.clip import ImageEncoder, TextEncoder
from lcm_jax.models.inception import SIZE, Inception
from lcm_jax.models.lpips import Trunk
from lcm_jax.models.tiny import autoencoder
from lcm_jax.models.unet import UNet

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}  # as configs name them


def abstract(module, *args, dtype=jnp.float32, **kwargs):
    """The parameters that `module.init(key, *args, **kwargs)` would make, as shapes of `dtype`."""
    params = _traced(module, args, tuple(kwargs.items()))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


@functools.cache  # a UNet's takes a second, and a run asks for it several times
def _traced(module, args, kwargs):
    return jax.eval_shape(module.init, jax.random.key(0), *args, **dict(kwargs))['params']


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _repeated(tree, name, layers):
    """The tree with its first of equal layers, `name` + '0', in `layers` places: traced once."""
    one = tree.pop(name + '0')
    return tree | {f'{name}{i}': one for i in range(layers)}


def unet_shapes(spec, dtype=jnp.float32):
    """UNetSpec -> the parameter tree of `UNet(spec)`."""
    side = spec.factor
    down, up = (
        tuple(tuple(min(depth, 1) for depth in level) for level in way)
        for way in (spec.down, spec.up)
    )
    tree = abstract(
        UNet(dataclasses.replace(spec, down=down, mid=spec.mid and 1, up=up)),
        _floats(1, side, side, spec.in_channels),
        _floats(1),
        _floats(1, 1, spec.context_dim),
        pooled=_floats(1, spec.pooled_dim) if spec.pooled_dim else None,
        sizes=_floats(1, 6) if spec.size_dim else None,
        w=_floats(1, spec.w_dim) if spec.w_dim else None,
        dtype=dtype,
    )
    blocks = {f'down_blocks.{i}': level for i, level in enumerate(spec.down)}
    blocks |= {f'up_blocks.{i}': level for i, level in enumerate(spec.up)}
    for block, level in (blocks | {'mid_block': (spec.mid or 0,)}).items():
        for j, depth in enumerate(level):
            if depth:
                name = f'{block}.attentions.{j}'
                tree[name] = _repeated(tree[name], 'transformer_blocks.', depth)
    return tree


def vae_shapes(spec, dtype=jnp.float32):
    """VAESpec or TinySpec -> the parameter tree of `autoencoder(spec)`."""
    return abstract(autoencoder(spec), _floats(1, spec.factor, spec.factor, 3), dtype=dtype)


def text_shapes(spec, dtype=jnp.float32):
    """TextSpec -> the parameter tree of `TextEncoder(spec)`."""
    ids = jax.ShapeDtypeStruct((1, spec.length), jnp.int32)
    tree = abstract(TextEncoder(dataclasses.replace(spec, layers=1)), ids, dtype=dtype)
    return _repeated(tree, 'text_model.encoder.layers.', spec.layers)


def vision_shapes(spec, dtype=jnp.float32):
    """VisionSpec -> the parameter tree of `ImageEncoder(spec)`."""
    pictures = _floats(1, spec.size, spec.size, 3)
    tree = abstract(ImageEncoder(dataclasses.replace(spec, layers=1)), pictures, dtype=dtype)
    return _repeated(tree, 'vision_model.encoder.layers.', spec.layers)


def inception_shapes(dtype=jnp.float32):
    """-> the parameter tree of `Inception()`."""
    return abstract(Inception(), _floats(1, SIZE, SIZE, 3), dtype=dtype)


def trunk_shapes(spec, dtype=jnp.float32):
    """TrunkSpec -> the parameter tree of `Trunk(spec)`."""
    return abstract(Trunk(spec), _floats(1, spec.least, spec.least, 3), dtype=dtype)


def head_shapes(spec, dtype=jnp.float32):
    """TrunkSpec -> the tree of LPIPS' heads, one 1x1 convolution to one channel for each stage."""
    return {
        f'lin{i}.model.1': {'kernel': jax.ShapeDtypeStruct((1, 1, width, 1), dtype)}
        for i, width in enumerate(spec.widths)
    }
