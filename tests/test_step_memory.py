"""The compiled LCM-LoRA step holds the frozen base once, for student, teacher and target."""

import re
import runpy

import jax
import jax.numpy as jnp
import optax
import pytest
import runs

from lcm_jax import aot, loop, plan, sharding, step, workloads
from lcm_jax.chips import devices_of
from lcm_jax.families import SD
from lcm_jax.models.clip import TextSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.scheduler import read_schedule
from lcm_jax.tree import named

SETTINGS = {'data.cache': True, 'lora.rank': 8, 'train.batch': 1, 'train.ema_decay': 0.0}


def program(dtype, device, width=512, **settings):
    """-> the step.Program, and its mesh; settings have '__' for '.'."""
    config = runpy.run_path(str(runs.CONFIGS / 'default.py'))['get_config']()
    settings = {key.replace('__', '.'): value for key, value in settings.items()}
    config.update_from_flattened_dict(SETTINGS | {'dtype': dtype} | settings)
    unet = UNetSpec(
        widths=(width,),
        down=((1,),),
        mid=None,
        up=((0, 0),),
        heads=(2,),
        context_dim=width,
        groups=4,
    )
    text = TextSpec(width=width, layers=1, heads=2, mlp=16)
    specs = {'unet': unet, 'vae': runs.MODEL.vae, 'text_encoder': text}
    schedule = read_schedule(workloads.NOISE | {'prediction_type': 'epsilon'}, 'noise')
    mesh = sharding.make_mesh(devices=[device])
    return step.program(specs, SD, schedule, config, mesh), mesh


def lora_step(dtype, device, width=512):
    """-> the plan.Program of a step, and the bytes of its base.

    One sample of 4 x 4 latents: at this width the base outweighs all activations by far.
    """
    prog, mesh = program(dtype, device, width)
    return workloads.training(prog, (8, 8), mesh), plan.held(prog.frozen['unet'])


def assert_once(dtype, device, width=512):
    """Among the arguments once; what else the step needs at any time is far less than a copy."""
    program, base = lora_step(dtype, device, width)
    rest = sum(plan.held(tree) for kind, tree in program.args.items() if kind != 'frozen')
    cost = plan.compiled(program)
    assert 0.99 < (cost.arguments - rest) / base < 1.01
    assert cost.temporaries + cost.results < 0.25 * base


@pytest.fixture
def quick_compiler():
    """Without optimizations of machine code, which take most of the time."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


def test_one_copy_of_the_base(quick_compiler):
    """0.05 of it in temporaries."""
    assert_once('float32', jax.devices()[0])


def test_validation_takes_a_batch_in_the_parts_of_the_step(quick_compiler):
    """Else it is the one that needs too much memory."""
    found = []
    for parts in (1, 8):
        settings = {'train__batch': 64, 'train__accumulate': parts}
        prog, _ = program('float32', jax.devices()[0], 16, **settings)
        args = prog.state.params, prog.state.ema, prog.frozen, prog.batch((64, 64))
        key = jax.eval_shape(lambda: jax.random.key(0))
        found.append(jax.jit(prog.loss).lower(*args, key).compile())
    whole, cut = (program.memory_analysis().temp_size_in_bytes for program in found)
    assert cut < 0.3 * whole


@pytest.mark.full  # a minute
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_one_copy_of_the_base_on_a_tpu(dtype):
    """0.04 of it in temporaries. At this width no copy fits in the chip's 128 MiB of vector memory,
    which do not count. (For CPUs, which multiply no bfloat16, XLA itself widens all kernels.)
    """
    pytest.importorskip('libtpu')
    assert_once(dtype, devices_of('v5e:1x1')[0], width=2048)


def test_a_bfloat16_base_is_asked_for_in_no_other_type():
    """Whatever the device makes of it: float32 parts of the step do not read kernels as float32."""
    program, _ = lora_step('bfloat16', jax.devices()[0])
    text = jax.jit(program.fn).lower(*program.args.values()).as_text()

    def kind(x, dtype):
        return f'tensor<{"x".join(map(str, x.shape))}x{dtype}>'

    kernels = [x for path, x in named(program.args['frozen']['unet']) if path.endswith('kernel')]
    assert len(kernels) > 20 and all(kind(x, 'bf16') in text for x in kernels)
    assert not {kind(x, 'f32') for x in kernels if kind(x, 'f32') in text}


def test_an_update_writes_in_place():
    """No copy of parameters or moments waits for the update while the gradients are made."""
    trained = {f'{i}': jax.ShapeDtypeStruct((256, 256), jnp.float32) for i in range(4)}

    def loss(params, ema, frozen, batch, key):
        for w in params.values():
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch**2)

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(lambda params: loop.init(params, tx, 0.9), trained)
    batch = jax.ShapeDtypeStruct((8, 256), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    made = aot.compiled(loop.make_step(loss, tx, 0.9), state, {}, batch, key, donate_argnums=0)
    entry = made.as_text().split('\nENTRY ')[1]
    matrices = {*re.findall(r'%([\w.\-]+) = f32\[256,256\]\S* parameter\(', entry)}
    assert len(matrices) == 16  # parameters, average, two moments
    assert not matrices & {*re.findall(r' copy\(%([\w.\-]+)\)', entry)}


def test_the_update_is_a_branch_on_cpus_alone():
    """On TPUs one moved a third more bytes than the choice between numbers."""

    def loss(params, ema, frozen, batch, key):
        return jnp.sum(params * batch)

    tx = optax.adam(1e-3)
    state = loop.init(jnp.ones(3), tx, 0.0)
    traced = jax.jit(loop.make_step(loss, tx)).trace(state, {}, jnp.ones(3), jax.random.key(0))
    cases = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count('stablehlo.case')
        for platform in ('cpu', 'tpu', 'cuda')
    }
    assert cases['cpu'] - 1 == cases['tpu'] == cases['cuda']  # the rest are of the platform
