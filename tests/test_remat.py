"""What the backward pass computes again changes its cost alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_strips import MODEL

from lcm_jax import lora
from lcm_jax.errors import InputError
from lcm_jax.flops import flops
from lcm_jax.models import shapes
from lcm_jax.models.unet import REMAT, UNet
from lcm_jax.tree import named


def loss_of(remat):
    """-> loss(adapter, params, z): of the UNet with a LoRA."""

    def loss(adapter, params, z):
        def net(z):
            t, context = jnp.array([500.0]), z.reshape(1, -1, MODEL.unet.context_dim)
            return UNet(MODEL.unet, remat).apply({'params': params}, z, t, context)

        return jnp.mean(lora.apply(net, adapter, 0.5)(z) ** 2)

    return loss


@pytest.fixture(scope='module')
def args():
    rng = np.random.default_rng(0)

    def draw(tree):
        return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), tree)

    params = draw(shapes.unet_shapes(MODEL.unet))
    adapter = draw(jax.eval_shape(lambda: lora.init(jax.random.key(1), params, 2)))
    return adapter, params, rng.standard_normal((1, 8, 8, 4), np.float32)


@pytest.fixture(scope='module')
def plain(args):
    return jax.jit(jax.value_and_grad(loss_of('none')))(*args)


@pytest.mark.parametrize('remat', [name for name in REMAT if name != 'none'])
def test_same_loss_and_gradients(remat, args, plain):
    loss, grads = jax.jit(jax.value_and_grad(loss_of(remat)))(*args)
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    for (path, ours), (_, theirs) in zip(named(grads), named(plain[1]), strict=True):
        np.testing.assert_allclose(
            ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()), err_msg=path
        )


@pytest.mark.parametrize('remat', REMAT)
def test_same_parameters(remat):
    z, t, context = jnp.ones((1, 8, 8, 4)), jnp.ones(1), jnp.ones((1, 5, 8))
    tree = jax.eval_shape(UNet(MODEL.unet, remat).init, jax.random.key(0), z, t, context)
    assert jax.tree.map(jnp.shape, tree['params']) == jax.tree.map(
        jnp.shape, shapes.unet_shapes(MODEL.unet)
    )


def test_only_gradients_pay(args):
    forward = {name: flops(loss_of(name), *args) for name in REMAT}
    backward = {name: flops(jax.grad(loss_of(name)), *args) for name in REMAT}
    assert len({*forward.values()}) == 1
    assert backward['blocks'] > backward['none']


def test_unknown_policy(args):
    with pytest.raises(InputError, match='blocks'):
        loss_of('block')(*args)
