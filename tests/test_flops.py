"""The counter of matrix work against counts by hand and the compiler's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lcm_jax.flops import flops
from lcm_jax.models.attention import attend

A, B = jnp.zeros((2, 3)), jnp.zeros((3, 5))


def conv(x, k, stride=1):
    return lax.conv_general_dilated(
        x, k, (stride,) * 2, ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def loop(f):
    return lambda a, b: lax.scan(lambda c, _: (c, f(a, b)), 0, length=7)


@pytest.mark.parametrize(
    ('fn', 'times'),
    [
        (jnp.dot, 1),
        (jax.jit(jnp.dot), 1),
        (jax.checkpoint(jnp.dot), 1),
        (loop(jnp.dot), 7),
        (lambda a, b: lax.map(lambda x: x @ b, jnp.stack([a] * 4)), 4),
        (lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b + a @ b), 2),
        (lambda a, b: lax.platform_dependent(a, b, cpu=jnp.dot, default=lambda a, b: 2 * a @ b), 1),
        (lambda a, b: a[:, :1] * b[0], 0),
    ],
)
def test_products(fn, times):
    assert flops(fn, A, B, platform='cpu') == times * 2 * 2 * 3 * 5


def test_gradients():
    """Of both sides, as much again each."""
    grad = jax.grad(lambda a, b: jnp.sin(a @ b).sum(), argnums=(0, 1))
    assert flops(grad, A, B) == 3 * flops(jnp.dot, A, B)
    x, k = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))
    for stride in (1, 2):
        forward = 2 * 2 * (8 // stride) ** 2 * 9 * 3 * 4
        assert flops(lambda x, k, s=stride: conv(x, k, s), x, k) == forward
        grad = jax.grad(lambda x, k, s=stride: jnp.sin(conv(x, k, s)).sum(), argnums=(0, 1))
        np.testing.assert_allclose(flops(grad, x, k), 3 * forward, rtol=0.15)


def test_remat_counts_what_is_computed_again():
    def f(a, b):
        return jnp.sin(jnp.sin(a @ b) @ b.T).sum()

    again = jax.checkpoint(f)
    assert flops(jax.grad(again), A, B) > flops(jax.grad(f), A, B)


def test_shards_count_together():
    mesh = jax.make_mesh((1,), ('x',), axis_types=(AxisType.Auto,))
    fn = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P('x'), P()), out_specs=P('x'))
    assert flops(fn, A, B) == 2 * 2 * 3 * 5


def test_attention():
    """Two products forward, in any kernel; backward at least four, and what is computed again."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    one = 2 * 2 * 1024 * 1024 * 64

    def total(*args):
        return attend(*args).astype(jnp.float32).sum()

    for platform in ('cpu', 'tpu', 'cuda'):
        assert flops(attend, x, x, x, platform=platform) == 2 * one
        backward = flops(jax.grad(total, argnums=(0, 1, 2)), x, x, x, platform=platform) - 2 * one
        assert 4 * one <= backward < 7.1 * one


def test_agrees_with_the_compiler():
    def f(x, k, w):
        return jnp.sin(conv(x, k)).reshape(2, -1) @ w

    args = jnp.ones((2, 32, 32, 8)), jnp.ones((3, 3, 8, 8)), jnp.ones((8192, 16))
    xla = jax.jit(f).lower(*args).compile().cost_analysis()['flops']
    np.testing.assert_allclose(flops(f, *args), xla, rtol=0.08)
