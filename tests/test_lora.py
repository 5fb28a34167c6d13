"""LoRA as functions on parameters."""

import dataclasses
import functools
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax import lora
from lcm_jax.errors import InputError
from lcm_jax.models.shapes import unet_shapes
from lcm_jax.models.unet import UNet, UNetSpec
from lcm_jax.models.zoo import MODELS
from lcm_jax.tree import count, named

# It has every kind of adapted layer: Dense with and without bias, 1x1, 3x3 and 3x3 strided conv.
SPEC = UNetSpec(
    widths=(8, 16),
    down=((1,), (0,)),
    mid=1,
    up=((0, 0), (1, 1)),
    heads=(2, 2),
    context_dim=12,
    groups=4,
)
TINY = dataclasses.replace(SPEC, down=((0,), (0,)), up=((0, 0), (0, 0)))  # quicker to compile


@functools.cache
def base(spec=SPEC):
    """Random parameters of the small UNet, as numpy arrays; none of them is zero."""
    return randomised(unet_shapes(spec), 1.0)


def randomised(tree, size, seed=0):
    """Kernels of norm about `size` per output channel; biases and norms' scales around a half."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        value = rng.normal(size=x.shape)
        value = size * value / np.prod(x.shape[:-1]) ** 0.5 if x.ndim > 1 else 0.5 + 0.2 * value
        return value.astype(np.float32)

    return jax.tree.map(leaf, tree)


@functools.cache
def adapter(spec=SPEC, seed=1):
    """An adapter of rank 4 for the small UNet as after training: no factor is zero."""
    return randomised(abstract_adapter(unet_shapes(spec), 4), 0.5, seed)


def abstract_adapter(shapes, rank):
    return jax.eval_shape(lambda key: lora.init(key, shapes, rank), jax.random.key(0))


def inputs():
    rng = np.random.default_rng(2)
    z, context = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 4, 4), (2, 3, 12)))
    return z, np.array([19.0, 999.0], np.float32), context


def net(params, *args):
    return UNet(TINY).apply({'params': params}, *args)


def relative(got, want):
    """Norm of the difference over the norm, of whole trees."""
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# The functions


def test_init_covers_the_targets_and_is_neutral():
    ab = lora.init(jax.random.key(0), base(), 3)
    assert not [path for path in ab if re.search(r'conv_in|conv_out|time_embedding', path)]
    assert ab['down_blocks.0.resnets.0/conv1/kernel']['down'].shape == (3, 3, 8, 3)
    assert ab['down_blocks.0.resnets.0/conv1/kernel']['up'].shape == (1, 1, 3, 8)
    to_k = ab['mid_block.attentions.0/transformer_blocks.0/attn2/to_k/kernel']
    assert to_k['down'].shape == (12, 3) and to_k['up'].shape == (3, 16)
    for path, factors in ab.items():
        assert not factors['up'].any()
        bound = np.prod(factors['down'].shape[:-1]) ** -0.5  # kaiming_uniform(a=sqrt(5)), as PEFT
        assert 0.8 * bound < np.abs(factors['down']).max() <= bound, path
        assert np.abs(factors['down'].mean()) < 0.5 * bound, path
    jax.tree.map(np.testing.assert_array_equal, lora.merge(base(), [(ab, 1.0)]), base())


def test_init_without_a_match_is_refused():
    with pytest.raises(InputError, match=r"no parameter matches the LoRA targets 'to_qq'"):
        lora.init(jax.random.key(0), base(), 3, 'to_qq')


@pytest.mark.parametrize(
    ('model', 'modules', 'parameters'),
    [('sd15', 278, 67_252_224), ('ssd1b', 423, 104_902_656), ('sdxl', 788, 196_751_360)],
)
def test_target_modules_at_full_size(model, modules, parameters):
    shapes = unet_shapes(MODELS[model].unet)
    ab = abstract_adapter(shapes, 64)
    assert (len(ab), count(ab)) == (modules, parameters)


@functools.cache
def forwards():
    """way -> jitted (adapter, traced scale) -> (output, gradient of a loss by the adapter)."""
    args, params = inputs(), base(TINY)
    remat = partial(nn.remat(UNet)(TINY).apply, {'params': params})
    ways = {
        'merge': lambda ab, scale: net(lora.merge(params, [(ab, scale)]), *args),
        'apply': lambda ab, scale: lora.apply(partial(net, params), ab, scale)(*args),
        'apply, rematerialised': lambda ab, scale: lora.apply(remat, ab, scale)(*args),
    }

    def both(way):
        def loss(ab, scale):
            out = way(ab, scale)
            return jnp.mean(jnp.sin(3 * out)), out

        def run(ab, scale):
            gradient, out = jax.grad(loss, has_aux=True)(ab, scale)
            return out, gradient

        return jax.jit(run)

    return {name: both(way) for name, way in ways.items()}


@pytest.mark.parametrize('way', ['apply', 'apply, rematerialised'])
def test_apply_is_merge(way):
    out, gradient = forwards()[way](adapter(TINY), 0.7)
    want, want_gradient = forwards()['merge'](adapter(TINY), 0.7)
    without, _ = forwards()['merge'](adapter(TINY), 0.0)
    assert relative(want, without) > 0.05
    worst = max(relative(gradient[path], want_gradient[path]) for path in want_gradient)
    print(f'{way}: output differs by {relative(out, want):.1e}, gradients by at most {worst:.1e}')
    assert relative(out, want) < 1e-5
    assert worst < 1e-4


@pytest.mark.parametrize(
    'layer',
    [
        partial(nn.Dense, 6),
        partial(nn.Dense, 6, use_bias=False),
        partial(nn.Conv, 6, (1, 1)),
        partial(nn.Conv, 6, (3, 3), strides=2),
        partial(nn.Conv, 6, (3, 3), strides=(1, 2), padding=1),
        partial(nn.Conv, 6, (3, 3), padding=((1, 1), (0, 2))),
        partial(nn.Conv, 6, (3, 3), kernel_dilation=2, padding='VALID'),
    ],
)
def test_apply_is_merge_for_every_form_of_a_layer(layer):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(name='conv1')(x)

    x = inputs()[0].repeat(2, 1).repeat(2, 2)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)['params']
    params, ab = randomised(shapes, 0.3), randomised(abstract_adapter(shapes, 2), 0.5)
    applied = lora.apply(lambda x: Net().apply({'params': params}, x), ab, 0.7)(x)
    want = Net().apply({'params': lora.merge(params, [(ab, 0.7)])}, x)
    assert relative(applied, want) < 1e-5


def test_half_precision_base_stays_half():
    half, *args = optax.tree.cast((base(TINY), *inputs()), jnp.bfloat16)
    scale = jnp.float32(0.7)
    out = jax.eval_shape(lambda ab: lora.apply(partial(net, half), ab, scale)(*args), adapter(TINY))
    assert out.dtype == jnp.bfloat16
    merged = jax.eval_shape(lambda ab: lora.merge(half, [(ab, scale)]), adapter(TINY))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype('bfloat16')}


def test_merge_adds_scaled_updates_and_undoes_them():
    there, more = (adapter(), 0.8), (adapter(seed=5), 1.0)
    back = lora.merge(lora.merge(base(), [there]), [(adapter(), -0.8)])
    assert relative(back, base()) < 1e-6
    both = lora.merge(base(), [there, more])
    assert relative(lora.merge(lora.merge(base(), [there]), [more]), both) < 1e-6
    path = 'mid_block.resnets.0/conv1/kernel'
    want = 0.8 * lora.delta(adapter()[path]) + lora.delta(adapter(seed=5)[path])
    got = dict(named(both))[path] - dict(named(base()))[path]
    assert relative(got, want) < 1e-5


def test_merge_refuses_what_the_model_lacks():
    with pytest.raises(
        InputError, match=r'1 of 2 adapted modules are not in the model: nowhere/kernel'
    ):
        path = 'mid_block.resnets.0/conv1/kernel'
        ab = adapter()[path]
        lora.merge(base(), [({path: ab}, 1.0), ({'nowhere/kernel': ab}, 1.0)])
