"""The training step that a config asks for: what it holds, where that lies, what it computes.

Built from sizes alone, so that the same step trains here and is planned for chips that are not here.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcm_jax import loop, sharding
from lcm_jax.distill import DISTANCES, OBJECTIVES, ODE_STEPS, Nets, Noise, draw, each, w_range
from lcm_jax.encode import encoded
from lcm_jax.errors import InputError, about, choose
from lcm_jax.models import shapes
from lcm_jax.models.unet import REMAT
from lcm_jax.student import STUDENTS, Student, network, samples_each, student_net, zeros

NULLS = {'model': None, 'empty': False, 'zeros': True}  # whether the null condition is zeros
TARGETS = {'student': lambda params, ema: params, 'ema': lambda params, ema: ema}
CHOICES = {  # key of a config -> what it may be
    'distill.solver': ODE_STEPS,
    'distill.null': NULLS,
    'distill.distance': DISTANCES,
    'distill.target': TARGETS,
    'train.remat': REMAT,
    'train.best': dict.fromkeys(('', 'distance', 'validation')),
    'export.weights': dict.fromkeys(('params', 'ema')),
}
INF = float('inf')
RANGES = {  # key of a config -> the least and the largest value that mean something
    'data.validation_batches': (1, INF),
    'lora.rank': (1, INF),
    'lora.alpha': (0, INF),
    'full.w_dim': (0, INF),
    'distill.huber_c': (0, INF),
    'distill.min_snr': (0, INF),
    'train.steps': (0, INF),
    'train.batch': (1, INF),
    'train.accumulate': (1, INF),
    'train.lr': (0, 1e3),
    'train.warmup': (0, INF),
    'train.b2': (0, 1),
    'train.weight_decay': (0, INF),
    'train.clip': (0, INF),
    'train.caption_dropout': (0, 1),
    'train.seed': (0, 2**32 - 1),
    'train.max_skipped': (0, INF),
    'train.log_every': (1, INF),
    'train.save_every': (1, INF),
    'train.keep': (1, INF),
    'preview.seed': (0, 2**32 - 1),
}


class Program(NamedTuple):
    """A training step. State and frozen are trees of ShapeDtypeStructs that say where they lie."""

    state: loop.State
    frozen: dict  # what the step reads: 'null'; 'unet', 'vae', 'text_encoder' where it asks them
    batch: Callable  # (height, width) px -> {name: ShapeDtypeStruct} of a global batch
    loss: Callable  # (trained, its average, frozen, batch, key) -> scalar, of as many parts as the step
    step: Callable  # (state, frozen, batch, key) -> (state, metrics), not jitted
    student: Student
    net: Callable  # (trained, frozen, w [B]) -> the student's net(z, t, **cond)
    tx: optax.GradientTransformation
    rate: Callable  # optimizer step -> learning rate


def program(specs, family, schedule, config, mesh):
    """specs by component, Family, Schedule (see `model.Model`), config, mesh -> Program.

    Raises InputError for settings outside what is supported, naming the key.
    """
    objective = choose('objective', config.objective, OBJECTIVES)
    if specs['unet'].in_channels != specs['vae'].latent_channels:
        raise InputError(
            f'{config.model}: its UNet takes {specs["unet"].in_channels} channels, latents have '
            f'{specs["vae"].latent_channels}; models for inpainting are drawn with, not trained'
        )
    if objective.teacher and (specs['unet'].w_dim or schedule.few_steps):
        raise InputError(
            f'{config.model} is a consistency model, which is no teacher; give objective '
            f'{config.objective!r} a diffusion model, or tune this one with objective lcf'
        )
    check(config, objective, sharding.groups(mesh))
    for key, sampler in (('steps', config.preview.sampler), ('teacher_steps', 'ddim')):
        with about(f'preview.{key}'):  # before hours are spent
            schedule.times(sampler, config.preview[key])
    tx, rate = optimizer(config.train)
    base = shapes.unet_shapes(specs['unet'], shapes.DTYPES[config.dtype])
    student = choose('trains', config.trains, STUDENTS)(specs['unet'], base, config)
    frozen = {'null': without_sizes(cond_shapes(specs, 1, shapes.DTYPES[config.dtype]))}
    if objective.teacher or not student.whole:
        frozen['unet'] = base
    if not cached(config):
        frozen |= encoder_shapes(specs, family, config)
    ema = config.train.ema_decay
    state = jax.eval_shape(
        lambda: loop.init(student.init(jax.random.key(0), jax.tree.map(zeros, base)), tx, ema)
    )
    rules = (*config.mesh.rules, *sharding.RULES)
    placed = sharding.placed({'state': state, 'frozen': frozen}, mesh, rules)
    unet = partial(network, mesh=mesh)
    loss = make_loss(specs, family, schedule, config, objective, student, unet)
    accumulate = config.train.accumulate

    def judge(params, ema, frozen, batch, key):
        def of(part):
            return loss(params, ema, frozen, part, key)

        return loop.in_parts(of, jnp.float32(0), batch, accumulate)

    return Program(
        placed['state'],
        placed['frozen'],
        partial(batch_shapes, specs, family, config, mesh),
        judge,
        loop.make_step(loss, tx, ema, accumulate),
        student,
        partial(student_net, student, unet),
        tx,
        rate,
    )


def check(config, objective, groups):
    """InputError for values that mean nothing or do not go together.

    objective: a row of OBJECTIVES; groups: of devices that share samples.
    """
    c, values = config.train, config.to_dict()
    for key, (least, most) in RANGES.items():
        part, name = key.split('.')
        if not least <= values[part][name] <= most:
            end = '' if most == INF else f' and at most {most}'
            raise InputError(f'{key} = {values[part][name]}; it must be at least {least}{end}')
    for key in ('dtype', 'vae_dtype'):
        choose(key, config[key], shapes.DTYPES)
    for key, table in CHOICES.items():
        part, name = key.split('.')
        choose(key, values[part][name], table)
    if not config.preview.prompts:
        raise InputError('preview.prompts is empty; give one or more')
    if c.best == 'validation' and not config.data.validation:
        raise InputError("train.best = 'validation' needs a source in data.validation")
    if c.best == 'distance' and not objective.target:
        raise InputError(
            "train.best = 'distance' is that to the base's pictures, from which objective "
            f"{config.objective!r} leads away; give 'validation', with a source in data.validation, "
            "or ''"
        )
    if not 0 <= c.ema_decay < 1:
        raise InputError(f'train.ema_decay = {c.ema_decay}; from 0 (no average) to below 1')
    averaged = 'ema' in (config.distill.target, config.export.weights)
    if averaged and not c.ema_decay:
        raise InputError("distill.target or export.weights 'ema' needs train.ema_decay above 0")
    if c.batch % (groups * c.accumulate):
        raise InputError(
            f'train.batch = {c.batch} samples; it must be a multiple of {groups * c.accumulate}: '
            f'{groups} groups of devices times train.accumulate = {c.accumulate}'
        )


def cached(config):
    """Whether batches hold latents and embeddings instead of pixels and token ids."""
    return config.data.cache or config.data.source.startswith('cache:')


def optimizer(c):
    """The keys of config.train -> optimizer, step -> learning rate."""
    if c.decay and c.warmup >= c.steps:
        raise InputError(
            f'train.warmup = {c.warmup} of {c.steps} steps; with decay it must be less'
        )
    if c.decay:
        rate = optax.warmup_cosine_decay_schedule(0, c.lr, c.warmup, c.steps, c.lr / 100)
    elif c.warmup:
        rate = optax.linear_schedule(0, c.lr, c.warmup)
    else:
        rate = optax.constant_schedule(c.lr)
    adam = optax.adamw(rate, b2=c.b2, weight_decay=c.weight_decay)
    return optax.chain(optax.clip_by_global_norm(c.clip or jnp.inf), adam), rate


# --- what is computed


def make_loss(specs, family, schedule, config, objective, student, unet):
    """-> loss(params, ema, frozen, batch, key) -> scalar; student and target share the base."""
    c, distill = config.train, config.distill
    abar, kind, total = np.asarray(schedule.abar), schedule.prediction_type, len(schedule.abar)
    with about('distill'):  # before hours are spent
        draws_of = partial(
            draw,
            steps=distill.solver_steps if objective.target else total,  # denoising: at any time
            total=total,
            w_range=w_range(distill.w),
            skip=distill.skip,
        )
        jax.eval_shape(lambda: draws_of(jax.random.key(0), jnp.arange(1), (1,)))
    measure, pick = objective.bind(distill), TARGETS[distill.target]
    encoders = {part: specs[part] for part in ('vae', *family.text_encoders)}
    keys_of_cond = [*cond_shapes(specs, 1, jnp.float32)]
    mesh = unet.keywords['mesh']

    def loss(params, ema, frozen, batch, key):
        rows, keys = batch['row'], jax.random.split(key, 3)
        if 'pixels' in batch:
            batch = encoded(encoders, frozen, batch, samples_each(len(rows), mesh))
        z = latents(batch, each(keys[1], rows), specs['vae'].scaling_factor)
        cond = {k: batch[k] for k in keys_of_cond}
        null = cond | {k: jnp.broadcast_to(x, cond[k].shape) for k, x in frozen['null'].items()}
        if c.caption_dropout:
            drop = jax.vmap(jax.random.uniform)(each(keys[2], rows)) < c.caption_dropout
            cond = jax.tree.map(lambda x, y: jax.vmap(jnp.where)(drop, y, x), cond, null)
        draws = draws_of(keys[0], rows, z.shape[1:])
        nets = Nets(
            student_net(student, partial(unet, remat=c.remat), params, frozen, draws.w),
            student_net(student, unet, pick(params, ema), frozen, draws.w)
            if objective.target
            else None,
            unet(specs['unet'], frozen['unet']) if objective.teacher else None,
        )
        told = {'z': z, 'cond': cond, 'null': null}
        return jnp.mean(measure(nets, told, draws, Noise(jnp.asarray(abar), kind)))

    return loss


def latents(batch, keys, scaling):
    """'mean', 'logvar' [B,h,w,C] and a key for each sample -> scaled latents drawn from them."""
    mean, std = batch['mean'], jnp.exp(0.5 * batch['logvar'])
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return scaling * (mean + std * noise)


# --- shapes


def cond_shapes(specs, n, dtype):
    """The condition of n samples, as ShapeDtypeStructs."""
    unet, length = specs['unet'], specs['text_encoder'].length
    cond = {'context': jax.ShapeDtypeStruct((n, length, unet.context_dim), dtype)}
    if unet.pooled_dim:
        cond['pooled'] = jax.ShapeDtypeStruct((n, unet.pooled_dim), dtype)
        cond['sizes'] = jax.ShapeDtypeStruct((n, 6), jnp.float32)
    return cond


def without_sizes(cond):
    """What the null condition replaces: all but the sizes, which stay the sample's own."""
    return {k: x for k, x in cond.items() if k != 'sizes'}


def encoder_shapes(specs, family, config):
    """The parameters of the VAE and the text encoders."""
    text = {
        p: shapes.text_shapes(specs[p], shapes.DTYPES[config.dtype]) for p in family.text_encoders
    }
    return text | {'vae': shapes.vae_shapes(specs['vae'], shapes.DTYPES[config.vae_dtype])}


def batch_shapes(specs, family, config, mesh, size):
    """A global batch of pictures of size (height, width) px -> {name: ShapeDtypeStruct}."""
    n, vae, home = config.train.batch, specs['vae'], sharding.batch_sharding(mesh)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((n, *shape), dtype)

    out = {'row': array(dtype=jnp.int32), 'sizes': array(6)}
    if cached(config):
        grid = (side // vae.factor for side in size)
        out |= cond_shapes(specs, n, shapes.DTYPES[config.dtype])
        out |= dict.fromkeys(('mean', 'logvar'), array(*grid, vae.latent_channels))
    else:
        length = specs['text_encoder'].length
        out['pixels'] = array(*size, 3, dtype=jnp.uint8)
        out['ids'] = array(len(family.text_encoders), length, dtype=jnp.int32)
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home) for k, x in out.items()}
