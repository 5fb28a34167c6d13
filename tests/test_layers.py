"""The layers' own ways of computing, against XLA's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcm_jax.models.layers import LARGE_KERNEL, Conv3, from_strips, group_norm, to_strips


@pytest.mark.parametrize('strides', [1, 2])
@pytest.mark.parametrize('shape', [(2, 5, 4, 240), (1, 1, 1, 240), (1, 20, 26, 240)])
def test_conv_equals_xla(shape, strides):
    """Pictures smaller than a large kernel, where CPUs take a matrix product, and a larger one."""
    x, layer = jax.random.normal(jax.random.key(0), shape), Conv3(512, strides=strides)
    params = layer.init(jax.random.key(1), x)['params']
    assert params['kernel'].size >= LARGE_KERNEL
    if x.size // x.shape[-1] <= 512:
        text = jax.jit(layer.apply).lower({'params': params}, x).as_text()
        assert 'dot_general' in text
        assert 'convolution' not in text

    def direct(params, x):
        return params['bias'] + lax.conv_general_dilated(
            x,
            params['kernel'],
            (strides, strides),
            ((1, 1), (1, 1)),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

    def with_gradients(fn):
        out, vjp = jax.vjp(fn, params, x)
        return out, vjp(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    ours = jax.jit(with_gradients, static_argnums=0)(lambda p, x: layer.apply({'params': p}, x))
    theirs = jax.jit(with_gradients, static_argnums=0)(direct)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize(
    ('strides', 'padding'), [(1, ((1, 1), (1, 1))), (2, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))]
)
def test_conv_of_strips(strides, padding):
    x, layer = jax.random.normal(jax.random.key(0), (2, 6, 8, 3)), Conv3(5, strides, padding)
    params = layer.init(jax.random.key(1), x)
    whole = layer.apply(params, x)
    for n in (1, 2, 4):
        parts = from_strips(layer.apply(params, to_strips(x, n)))
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    if strides == 2:
        with pytest.raises(ValueError, match='strips 1 columns wide'):
            layer.apply(params, to_strips(x, 8))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
def test_norms_far_from_zero(dtype, tolerance):
    """Of numbers whose mean is 10 times their spread."""
    x = jnp.asarray(10 + jax.random.normal(jax.random.key(0), (2, 32, 32, 8)), dtype)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return group_norm(4, epsilon=1e-6)(x)

    params = jax.tree.map(lambda p: p.astype(dtype), Net().init(jax.random.key(1), x))
    ours = Net().apply(params, x)
    assert ours.dtype == dtype
    groups = np.float64(x).reshape(2, -1, 4, 2)
    mean, spread = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.std))
    error = np.abs(np.float64(ours) - ((groups - mean) / spread).reshape(x.shape)).max()
    print(f'{dtype.__name__}: {error:.1e}')
    assert error <= tolerance
