"""Forward passes as planned for TPUs: in strips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax import lora, workloads
from lcm_jax.models.layers import from_strips, in_strips, strips_for, to_strips
from lcm_jax.models.unet import UNet, UNetSpec
from lcm_jax.models.vae import VAE, VAESpec
from lcm_jax.models.zoo import ModelSpec

pytestmark = pytest.mark.usefixtures('quick_compiler')
MODEL = ModelSpec(
    UNetSpec(
        widths=(8, 16),
        down=((0,), (1,)),
        mid=1,
        up=((1, 0), (0, 0)),
        heads=(2, 2),
        context_dim=8,
        groups=4,
    ),
    VAESpec(widths=(8, 8), resnets=1, groups=4),
    (),
    resolution=32,
)


def draw(tree, scale=1.0):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(
        [scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def assert_close(ours, reference):
    np.testing.assert_allclose(ours, reference, atol=2e-5 * float(jnp.abs(reference).max()))


def test_unet_in_strips():
    """Equal to the UNet of whole pictures, its LoRA too."""
    fn, params, inputs, _ = workloads.unet_forward(MODEL, 32, 1, jnp.float32)
    params, inputs = draw(params, 0.3), draw(inputs)
    whole = jax.jit(lambda params, x: UNet(MODEL.unet).apply({'params': params}, **x))
    assert_close(jax.jit(fn)(params, inputs), whole(params, inputs))
    adapter = draw(lora.init(jax.random.key(1), params, 2), 0.3)
    adapted = jax.jit(lora.apply(fn, adapter))(params, inputs)
    assert_close(adapted, whole(lora.merge(params, [(adapter, 1.0)]), inputs))


def test_vae_in_strips():
    fn, params, z, _ = workloads.vae_forward(MODEL, 32, 1, jnp.float32)
    params, z = draw(params, 0.3), draw(z)

    @jax.jit
    def both(params, z):
        def vae(x, method):
            return VAE(MODEL.vae).apply({'params': params}, x, method=method)

        pictures = vae(z, 'decode')
        encoded = jax.tree.map(from_strips, vae(to_strips(pictures, 8), 'encode'))
        return (fn(params, z), encoded), (pictures, vae(pictures, 'encode'))

    jax.tree.map(assert_close, *both(params, z))


def test_what_no_strips_divide_or_want_stays_whole():
    for width, stride, samples, dims in (
        (12, 8, 1, 4),
        (16, 8, 1, 5),
        (65, 8, 1, 4),
        (16, 8, None, 4),
    ):
        x, seen = jnp.zeros((1, 8, width, 1)), []
        in_strips(lambda x, seen=seen: seen.append(x.ndim) or x, x, stride, samples)
        assert seen == [dims]


def test_strips_fill_eight_rows():
    for samples in range(1, 20):
        assert samples * strips_for(samples) >= 8
        assert samples * strips_for(samples) < 16 or strips_for(samples) == 1
