"""What can be planned: a training step, the sampler, forward passes; built from sizes alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax import samplers, sharding
from lcm_jax.draw import Plan, draw
from lcm_jax.families import SD, SDXL
from lcm_jax.model import describe
from lcm_jax.models import shapes
from lcm_jax.models.layers import in_strips
from lcm_jax.models.tiny import autoencoder
from lcm_jax.models.unet import UNet
from lcm_jax.models.zoo import MODELS, PUBLISHED
from lcm_jax.plan import Program
from lcm_jax.scheduler import read_schedule

TOKENS = 77  # of text context
NOISE = {  # of Stable Diffusion's scheduler_config.json
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'num_train_timesteps': 1000,
}


def sizes_of(name):
    """A model's name as configs have it -> specs by component, Family, Schedule; reads no weights.

    Published models are known without their files.
    """
    row = MODELS.get(PUBLISHED.get(name, name))
    if row is None:
        model = describe(name)
        return model.specs, model.family, model.schedule
    family = SDXL if len(row.text) > 1 else SD
    specs = {
        'unet': row.unet,
        'vae': row.vae,
        **dict(zip(family.text_encoders, row.text, strict=True)),
    }
    return specs, family, read_schedule(NOISE | {'prediction_type': row.prediction_type}, name)


class Forward(NamedTuple):
    """fn(params, inputs), the shapes that one chip gives it, and the tokens of its self-attention."""

    fn: callable
    params: dict
    inputs: dict  # or one array
    tokens: set[int]


def unet_forward(model, size, batch, dtype):
    """The UNet of a ModelSpec for a chip's batch of pictures of size x size px."""
    spec, side = model.unet, size // model.vae.factor

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    def fn(params, inputs):
        def unet(z):
            return UNet(spec).apply({'params': params}, **inputs | {'z': z})

        return in_strips(unet, inputs['z'], spec.factor, batch)

    inputs = {
        'z': array(side, side, spec.in_channels),
        't': array(dtype=jnp.float32),
        'context': array(TOKENS, spec.context_dim),
    }
    if spec.pooled_dim:
        inputs |= {'pooled': array(spec.pooled_dim), 'sizes': array(6, dtype=jnp.float32)}
    if spec.w_dim:
        inputs['w'] = array(spec.w_dim)
    tokens = {(side // 2**i) ** 2 for i, depths in enumerate(spec.down) if any(depths)}
    return Forward(fn, shapes.unet_shapes(spec, dtype), inputs, tokens)


def vae_forward(model, size, batch, dtype):
    """The VAE decoder of a ModelSpec for a chip's batch of pictures of size x size px."""
    spec, side = model.vae, size // model.vae.factor

    def fn(params, z):
        def decode(z):
            return autoencoder(spec).apply({'params': params}, z, method='decode')

        return in_strips(decode, z, 1, batch)

    z = jax.ShapeDtypeStruct((batch, side, side, spec.latent_channels), dtype)
    return Forward(fn, shapes.vae_shapes(spec, dtype), z, {side**2})


FORWARDS = {'unet': unet_forward, 'vae': vae_forward}


def on_mesh(forward, mesh):
    """A Forward on every device of the mesh: each holds all parameters and inputs of its own."""
    n = mesh.devices.size
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((n * x.shape[0], *x.shape[1:]), x.dtype), forward.inputs
    )
    args = {
        'params': _lie(forward.params, sharding.replicated(mesh)),
        'inputs': _lie(inputs, sharding.batch_sharding(mesh)),
    }
    return Program(forward.fn, args, mesh, n * _rows(forward.inputs))


def _rows(tree):
    return jax.tree.leaves(tree)[0].shape[0]


def _lie(tree, home):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), tree)


def training(step, size, mesh):
    """step.Program, (height, width) px, mesh -> Program of one training step."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = {
        **step.state._asdict(),
        'frozen': step.frozen,
        'batch': step.batch(size),
        'key': _lie(key, sharding.replicated(mesh)),
    }
    kinds = step.state._fields

    def fn(*parts):
        state = type(step.state)(*parts[: len(kinds)])
        return step.step(state, *parts[len(kinds) :])

    homes = jax.tree.map(lambda x: x.sharding, step.state)
    return Program(fn, args, mesh, _rows(args['batch']), kinds, (homes, None))


def sampling(model, size, mesh, dtype, vae_dtype, steps=4):
    """specs, family, schedule; (height, width) px -> Program of an LCM's steps, a picture a device."""
    specs, _, schedule = model
    unet, vae, n = specs['unet'], specs['vae'], mesh.devices.size
    devices = Mesh(mesh.devices.reshape(-1), ('data',), axis_types=mesh.axis_types[:1])
    whole, split = (NamedSharding(devices, PartitionSpec(*axes)) for axes in ((), ('data',)))

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    grid = [side // vae.factor for side in size]
    cond = {'context': array(n, specs['text_encoder'].length, unet.context_dim, dtype=dtype)}
    if unet.pooled_dim:
        cond |= {'pooled': array(n, unet.pooled_dim, dtype=dtype), 'sizes': array(n, 6)}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n))
    rows = {'noise': array(n, *grid, vae.latent_channels), 'keys': keys, 'cond': cond}
    params = {'unet': shapes.unet_shapes(unet, dtype), 'vae': shapes.vae_shapes(vae, vae_dtype)}
    times = samplers.times('lcm', steps, len(schedule.abar))
    plan = Plan(
        unet,
        vae,
        schedule.prediction_type,
        'lcm',
        samplers.low_end(steps, times),
        devices.devices.flat[0].platform,
        devices,
    )

    def fn(params, rows):
        return draw(plan, params, jnp.asarray(schedule.abar), rows, {}, times, 1.0, True)

    args = {'params': _lie(params, whole), 'rows': _lie(rows, split)}
    return Program(fn, args, devices, n)
