"""The TPU's attention kernel, interpreted, and as it is lowered."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lcm_jax.models.attention import attend
from lcm_jax.models.flash import flash_attention


def with_gradients(fn, q, k, v, g):
    out, vjp = jax.vjp(fn, q, k, v)
    return out, *vjp(g)


def arrays(b, l, m, h, d, dtype=jnp.float32):
    """q, k, v and a cotangent of the output; scores up to about 30."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(scale * rng.normal(size=(b, n, h, d)), dtype)
        for scale, n in ((3, l), (2, m), (1, m), (1, l))
    ]


def largest_errors(ours, args):
    """Of the output and the gradients, relative to plain attention's largest number."""
    q, k, v, g = (x.astype(jnp.float32) for x in args)
    theirs = with_gradients(jax.nn.dot_product_attention, q, k, v, g)
    for x, y in zip(ours, theirs, strict=True):
        yield float(jnp.abs(x - y).max() / jnp.abs(y).max())


@pytest.mark.parametrize(
    ('shape', 'dtype', 'tolerance'),
    [
        ((2, 256, 256, 2, 40), jnp.float32, 6e-6),
        ((1, 1024, 640, 1, 160), jnp.float32, 6e-6),  # several blocks
        ((1, 200, 77, 2, 64), jnp.float32, 6e-6),  # rests of blocks
        ((1, 200, 77, 2, 64), jnp.bfloat16, 8e-3),
    ],
)
def test_equals_plain_attention(shape, dtype, tolerance):
    args = arrays(*shape, dtype)
    ours = jax.jit(partial(with_gradients, partial(flash_attention, interpret=True)))(*args)
    errors = list(largest_errors(ours, args))
    print(shape, dtype.__name__, *(f'{e:.1e}' for e in errors))
    assert max(errors) <= tolerance


ON_A_MESH = """
import sys
sys.path.append('tests')
from functools import partial
import jax, test_flash
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update('jax_num_cpu_devices', 4)
mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
args = test_flash.arrays(2, 128, 128, 3, 8)
fn = jax.checkpoint(partial(test_flash.flash_attention, interpret=True))
ours = jax.jit(partial(test_flash.with_gradients, fn))(*jax.device_put(args, NamedSharding(mesh, P('data'))))
print(max(test_flash.largest_errors(jax.device_get(ours), args)))
"""


def test_on_a_mesh():
    """One axis divides the batch of 2; the other cannot divide 3 heads and repeats the work."""
    done = subprocess.run(
        [sys.executable, '-c', ON_A_MESH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 6e-6


def test_devices_of_a_mesh_take_their_samples_and_heads():
    """Lowered for TPUs, each kernel sees one of 4 samples and half of the 8 heads."""
    mesh = AbstractMesh((4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P('data'))
    args = [jax.ShapeDtypeStruct((4, 1024, 8, 64), jnp.bfloat16, sharding=sharding)] * 4
    fn = jax.jit(lambda *args: with_gradients(attend, *args))
    text = fn.trace(*args).lower(lowering_platforms=('tpu',)).as_text()
    kernels = [line for line in text.splitlines() if 'tpu_custom_call' in line]
    assert len(kernels) == 3  # forward, gradient of q, gradient of k and v
    assert all('tensor<4x1024x64xbf16>' in line and '8x1024x64' not in line for line in kernels)
    assert '1024x1024' not in text
