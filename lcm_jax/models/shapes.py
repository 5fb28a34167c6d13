"""Parameter trees as shapes only (ShapeDtypeStructs): what a checkpoint must hold, known without weights.

Linen infers widths from inputs, so each function passes the smallest ones that fit.
"""

import jax
import jax.numpy as jnp

from lcm_jax.models.clip import ImageEncoder, TextEncoder
from lcm_jax.models.tiny import autoencoder
from lcm_jax.models.unet import UNet


def abstract(module, *args, dtype=jnp.float32, **kwargs):
    """The parameters that `module.init(key, *args, **kwargs)` would make, as shapes of `dtype`."""
    params = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)['params']
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def unet_shapes(spec, dtype=jnp.float32):
    """UNetSpec -> the parameter tree of `UNet(spec)`."""
    side = 2 ** (len(spec.widths) - 1)
    return abstract(
        UNet(spec),
        _floats(1, side, side, spec.in_channels),
        _floats(1),
        _floats(1, 1, spec.context_dim),
        pooled=_floats(1, spec.pooled_dim) if spec.pooled_dim else None,
        sizes=_floats(1, 6) if spec.size_dim else None,
        w=_floats(1, spec.w_dim) if spec.w_dim else None,
        dtype=dtype,
    )


def vae_shapes(spec, dtype=jnp.float32):
    """VAESpec or TinySpec -> the parameter tree of `autoencoder(spec)`."""
    return abstract(autoencoder(spec), _floats(1, spec.factor, spec.factor, 3), dtype=dtype)


def text_shapes(spec, dtype=jnp.float32):
    """TextSpec -> the parameter tree of `TextEncoder(spec)`."""
    return abstract(
        TextEncoder(spec), jax.ShapeDtypeStruct((1, spec.length), jnp.int32), dtype=dtype
    )


def vision_shapes(spec, dtype=jnp.float32):
    """VisionSpec -> the parameter tree of `ImageEncoder(spec)`."""
    return abstract(ImageEncoder(spec), _floats(1, spec.size, spec.size, 3), dtype=dtype)
