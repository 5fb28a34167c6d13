"""What a program costs on accelerators that are not here: compiled for them ahead of time.

TPUs need `jax[tpu]` installed and nothing more; without one, set JAX_PLATFORMS=cpu.
"""

import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lcm_jax.models import shapes
from lcm_jax.models.layers import in_strips
from lcm_jax.models.tiny import autoencoder
from lcm_jax.models.unet import UNet

TOKENS = 77  # of text context


class Forward(NamedTuple):
    """fn(params, inputs), the shapes that one chip gives it, and the tokens of its self-attention."""

    fn: callable
    params: dict
    inputs: dict  # or one array
    tokens: set[int]


class Cost(NamedTuple):
    """Of one device, as the compiler counts: a loop's body once, a custom kernel's operands only."""

    seconds: float  # to compile
    flops: float
    bytes_accessed: float
    temporaries: int  # bytes
    arguments: int  # bytes
    hlo: str

    def squares(self, tokens):
        """How often the program names an array with two neighbouring dimensions of so many tokens."""
        return len(re.findall(rf'\[(?:\d+,)*{tokens},{tokens}(?:,\d+)*\]', self.hlo))


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


def compiled_for(topology, fn, params, inputs):
    """Compile fn(params, inputs) for a named set of TPU chips ('v5e:2x2') -> Cost of one of them.

    Each chip holds all parameters and its own inputs: those of all are joined along the first axis.
    """
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    mesh = Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))

    def place(tree, chips, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))

        def one(x):
            shape = (chips * x.shape[0], *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(one, tree)

    lowered = jax.jit(fn).lower(place(params, 1), place(inputs, len(devices), 'data'))
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Cost(
        seconds,
        cost['flops'],
        cost['bytes accessed'],
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        compiled.as_text(),
    )
