"""Plans of small programs, for TPUs that are not here and for what is."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from test_strips import MODEL

from lcm_jax import cli, plan, plan_cli, sharding, workloads
from lcm_jax.chips import CHIPS, GIB, chip, devices_of
from lcm_jax.errors import InputError
from lcm_jax.hlo import Collective
from lcm_jax.models.zoo import MODELS, PUBLISHED


@pytest.fixture(scope='module')
def tpus():
    pytest.importorskip('libtpu')
    return sharding.make_mesh(devices=devices_of('v5e:2x2'))


def small(mesh, width=1024, samples=8):
    """A linear regression's step, data-parallel."""

    def array(*shape, axes=()):
        home = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=home)

    def fn(params, batch):
        grad = jax.grad(lambda w: jnp.mean((batch @ w) ** 2))(params)
        return params - grad

    args = {'params': array(width, 128), 'batch': array(samples, width, axes=('data',))}
    return plan.Program(fn, args, mesh, samples, ('params',))


def test_report_for_tpus(tpus):
    r = plan.report(small(tpus))
    assert (r.devices, r.samples) == (4, 8)
    assert r.collectives == [Collective('all-reduce', ('data',), 1, 1024 * 128 * 4)]
    assert (r.memory['params'], r.memory['batch']) == (1024 * 128 * 4, 2 * 1024 * 4)
    assert r.flops == 2 * 2 * (2 * 1024 * 128)  # there and back, two samples each
    assert r.needed == sum(r.memory.values()) < r.chip.memory and r.spare > 15 * GIB
    assert r.seconds[1] > r.seconds[0] > 0
    text = plan_cli.show(r, 'a step')
    assert 'all-reduce along data' in text and text.endswith('to spare')


def test_what_does_not_fit(tpus):
    r = plan.report(small(tpus, width=2**26))
    assert r.cost is None and r.needed > r.chip.memory == 15.75 * GIB
    assert 'DOES NOT FIT' in plan_cli.show(r, 'a step')


@pytest.mark.parametrize(
    ('text', 'needed'),
    [
        (
            'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.94G of 15.75G hbm.',
            18.94,
        ),
        (
            'the total memory required for HLO temporaries (1.5T) exceeds available HBM (15.75G).',
            1536,
        ),
    ],
)
def test_reads_what_the_compiler_says(text, needed):
    error = plan.TooLarge(text)
    assert (error.needed, error.memory) == (needed * GIB, 15.75 * GIB)


def test_report_for_what_is_here():
    r = plan.report(small(sharding.make_mesh(devices=jax.devices()[:1])))
    assert r.collectives == [] and r.needed < r.chip.memory
    plan_cli.show(r, 'a step')


def test_a_loop_moves_what_its_passes_move():
    """The compiler counts one of them."""
    home = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    args = {k: jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=home) for k in 'wx'}

    def moved(passes, unroll):
        def fn(w, x):
            return lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=passes, unroll=unroll)[0]

        return plan.compiled(plan.Program(fn, args, home.mesh, 1)).bytes_accessed

    assert moved(8, 1) == pytest.approx(moved(8, 8), rel=0.1)
    assert moved(8, 1) > 7 * moved(1, 1)


def test_forward_compiles_for_tpus(tpus):
    forward = workloads.unet_forward(MODEL, 32, 1, jnp.bfloat16)
    cost = plan.compiled(workloads.on_mesh(forward, tpus))
    assert cost.bytes_accessed > cost.arguments > 0


def test_topologies():
    pytest.importorskip('libtpu')
    for name, n, kind in (
        ('v4:2x2x1', 4, 'TPU v4'),  # a device is a whole chip, as where they are
        ('v5e:1x1', 1, 'TPU v5 lite'),
        ('v5e:4x4', 16, 'TPU v5 lite'),
        ('v5p:2x2x2', 8, 'TPU v5'),
        ('v6e:2x2', 4, 'TPU v6 lite'),
        ('2*v5e:2x2', 8, 'TPU v5 lite'),
    ):
        devices = devices_of(name)
        assert len(devices) == n and chip(devices[0]) == CHIPS[kind]
    for dcn in (1, 2):  # the devices say themselves that they are two slices
        mesh = sharding.make_mesh(dcn=dcn, fsdp=2, devices=devices)
        assert {d.slice_index for d in mesh.devices[:2].flat} == {0}
    for name in ('v5e:3x', 'h100', 'x*v5e:2x2'):
        with pytest.raises(InputError, match='v5e:4x4'):
            devices_of(name)


@pytest.mark.parametrize('name', [*MODELS, *PUBLISHED])
def test_published_models_are_known(name):
    specs, family, schedule = workloads.sizes_of(name)
    row = MODELS[PUBLISHED.get(name, name)]
    assert specs['unet'] == row.unet and schedule.prediction_type == row.prediction_type
    assert {*specs} == {'unet', 'vae', *family.text_encoders}


def test_command(capsys, monkeypatch):
    """The real step and the real sampler, with the compiler left out."""
    monkeypatch.setattr(
        plan, 'compiled', lambda program: plan.Cost(1.0, 1e9, 1e9, 3 * GIB, 0, 0, 0, 'HloModule x')
    )
    for kind in plan_cli.PROGRAMS:
        cli.main(
            f'plan --config configs/emoji_lcm_lora.py --topology local --program {kind} '
            '--config.train.batch=8'.split()
        )
        out = capsys.readouterr().out
        assert 'temporaries' in out and 'fits, with' in out


def test_a_gpu_is_counted_by_the_default_path(monkeypatch):
    """As training counts it: cuDNN's kernels cannot be looked into."""
    monkeypatch.setattr(plan, 'compiled', lambda program: plan.Cost(*(0,) * 7, 'HloModule x'))
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=home)

    def fn(a, b):
        return lax.platform_dependent(a, b, cuda=lambda a, b: a + b, default=jnp.dot)

    gpu = SimpleNamespace(platform='gpu', device_kind='NVIDIA H100 80GB HBM3')
    mesh = SimpleNamespace(devices=np.array([gpu]), shape={'data': 1})
    assert plan.report(plan.Program(fn, {'a': x, 'b': x}, mesh, 1)).flops == 2 * 8**3


def test_unknown_devices_are_not_judged():
    r = plan.Report(plan.Chip(*(math.nan,) * 3), 1, 1, {}, 5.0, 1.0, None, [])
    assert 'not known' in plan_cli.verdict(r)
