"""Mesh, rules and batches, on eight devices that one CPU stands in for."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lcm_jax import lora, sharding
from lcm_jax.errors import InputError
from lcm_jax.features import open_features, open_lpips
from lcm_jax.models import shapes
from lcm_jax.models.zoo import MODELS
from lcm_jax.tree import named


def test_on_eight_devices():
    """The functions named on_..., in a process that has eight devices."""
    env = os.environ | {
        'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@dataclasses.dataclass(frozen=True)
class Gpu:
    id: int
    process_index: int
    slice_index: int
    platform: str = 'gpu'
    device_kind: str = 'H100'


def test_gpus_of_several_hosts_are_divided_as_one_likes():
    """Their number of a host is no TPU slice's: parameters may be divided across hosts."""
    devices = [Gpu(i, i // 2, i // 2) for i in range(4)]
    for sizes, expected in (({'fsdp': 4}, (1, 4, 1)), ({'dcn': 2, 'fsdp': 2}, (2, 2, 1))):
        mesh = sharding.make_mesh(**sizes, devices=devices)
        assert tuple(mesh.shape.values()) == expected


def on_mesh_sizes():
    for sizes, expected in (
        ({}, (8, 1, 1)),
        ({'fsdp': 4}, (2, 4, 1)),
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
        ({'data': 1, 'tensor': -1}, (1, 1, 8)),
    ):
        mesh = sharding.make_mesh(**sizes)
        assert tuple(mesh.shape.values()) == expected and mesh.axis_names == sharding.AXES
        assert {*mesh.devices.flat} == {*jax.devices()}
    for sizes in ({'data': 3}, {'fsdp': 3}, {'data': 0}, {'fsdp': -1}, {'dcn': 3}, {'dcn': 2}):
        with pytest.raises(InputError):
            sharding.make_mesh(**sizes)


def on_rules():
    mesh = sharding.make_mesh(2, 2, 2)
    tree = {
        'attn1': {'to_q': {'kernel': (8, 8)}, 'to_out.0': {'kernel': (8, 8), 'bias': (8,)}},
        'conv1': {'kernel': (3, 3, 4, 8)},
        'conv_in': {'kernel': (3, 3, 5, 8)},
        'conv2': {'kernel': (3, 3, 8, 8)},
        'step': (),
        'mu': {'attn1/to_q/kernel': {'down': (8, 4), 'up': (4, 8)}},
        'nu': {'attn1/to_out.0/kernel': {'down': (8, 4), 'up': (4, 8)}},
    }
    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: type(x) is tuple
    )
    specs = {path: s.spec for path, s in named(sharding.shardings(tree, mesh, sharding.RULES))}
    assert specs == {
        'attn1/to_q/kernel': P('fsdp', 'tensor'),
        'attn1/to_out.0/kernel': P('tensor', 'fsdp'),
        'attn1/to_out.0/bias': P(None),
        'conv1/kernel': P(None, None, None, ('tensor', 'fsdp')),
        'conv_in/kernel': P(None, None, None, None),
        'conv2/kernel': P(None, None, ('tensor', 'fsdp'), None),
        'step': P(),
        'mu/attn1/to_q/kernel/down': P('fsdp', None),
        'mu/attn1/to_q/kernel/up': P('fsdp', 'tensor'),
        'nu/attn1/to_out.0/kernel/down': P('tensor', 'fsdp'),
        'nu/attn1/to_out.0/kernel/up': P(None, 'fsdp'),
    }
    joint = sharding.shardings(tree['attn1'], mesh, ((r'.*', (('data', 'fsdp'),)),))
    assert joint['to_q']['kernel'].spec == P(None, ('data', 'fsdp'))
    for rules in (sharding.RULES[:3], (('.*', ('model',)),), (('.*', 'fsdp'),), (('.*',),)):
        with pytest.raises(InputError):
            sharding.shardings(tree, mesh, rules)


def on_batches():
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
        place = sharding.batch_sharding(sharding.make_mesh(*sizes))
        rows = sharding.local_rows(place, 16)
        assert rows.tolist() == list(range(16))
        batch = {'z': np.arange(48.0).reshape(16, 3), 't': np.arange(16)}
        placed = sharding.to_global(batch, place, rows, 16)
        assert placed['z'].sharding.is_equivalent_to(place, 2)
        jax.tree.map(np.testing.assert_array_equal, placed, batch)
    with pytest.raises(InputError):
        sharding.local_rows(sharding.batch_sharding(sharding.make_mesh()), 12)


def on_features():
    mesh = sharding.make_mesh(4, 2, 1)
    x = np.random.default_rng(0).integers(0, 256, (5, 48, 80, 3), dtype=np.uint8)
    one, many = (open_features('emoji', mesh=m, batch=3) for m in (None, mesh))
    assert one.identity == many.identity
    np.testing.assert_allclose(many.images(x), one.images(x), atol=1e-5)
    captions = ['a red heart', 'x']
    np.testing.assert_allclose(many.texts(captions), one.texts(captions), atol=1e-5)
    one, many = (open_lpips('emoji', mesh=m, batch=4) for m in (None, mesh))
    np.testing.assert_allclose(many.distance(x, x[::-1]), one.distance(x, x[::-1]), atol=1e-5)


@pytest.mark.parametrize('name', ['sd15', 'sdxl', 'ssd1b'])
def test_fsdp_divides_nearly_everything(name):
    """Of base weights and of adapters alike; in full a device would hold all of it."""
    devices = jax.devices() * 4
    mesh = jax.sharding.AbstractMesh((1, 4, 1), sharding.AXES)
    params = shapes.unet_shapes(MODELS[name].unet)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, 64))
    for tree in (params, {'mu': adapter}):
        places = sharding.shardings(tree, mesh)
        held = sum(
            np.prod(place.shard_shape(x.shape))
            for (_, x), (_, place) in zip(named(tree), named(places), strict=True)
        )
        assert held < 1.01 / len(devices) * sum(x.size for _, x in named(tree))


if __name__ == '__main__':
    on_mesh_sizes()
    on_rules()
    on_batches()
    on_features()
