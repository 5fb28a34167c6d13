"""What a run trains: an adapter of the UNet, or its own parameters; and the networks made of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from lcm_jax import lora as L
from lcm_jax import sharding
from lcm_jax.conditioning import guidance_embedding
from lcm_jax.distill import OBJECTIVES
from lcm_jax.draw import apply_unet
from lcm_jax.errors import InputError
from lcm_jax.models import shapes
from lcm_jax.models.layers import for_strips, in_strips
from lcm_jax.models.unet import UNet
from lcm_jax.tree import map_named, matches, named


class Student(NamedTuple):
    """What is trained: an adapter, or the UNet's own parameters."""

    spec: Any  # of its UNet
    init: Callable  # (key, base parameters) -> what is trained, float32
    bind: Callable  # (unet, trained, base parameters) -> net, where unet(spec, params) -> net
    alphas: dict  # of an adapter: {path: (rank, alpha)}
    whole: bool = False  # nothing of the base is left in it


def lora_targets(c):
    """The keys of config.lora -> rows as `lora.ranks` takes them."""
    rows = tuple(c.targets) or ((L.LCM_TARGETS, c.rank, c.alpha),)
    for row in rows:
        match row:
            case (str(), int(rank), float(alpha) | int(alpha)) if rank >= 0 and alpha >= 0:
                continue
        raise InputError(
            f'lora.targets has {row!r}; a row is (regex, rank, alpha): rank a whole number, 0 for what '
            'is left alone; alpha a number of 0 or more, 0 for the rank'
        )
    return [(regex, rank, alpha or rank) for regex, rank, alpha in rows]


def lora_student(spec, base, config):
    """An adapter of the base's UNet, rank and alpha by path."""
    alphas = L.ranks(base, lora_targets(config.lora))
    scales = {path: alpha / rank for path, (rank, alpha) in alphas.items()}

    def init(key, params):
        return L.init(key, base, alphas)

    def bind(unet, trained, params):
        return L.apply(unet(spec, params), trained, scales)

    return Student(spec, init, bind, alphas)


def full_student(spec, base, config):
    """Parameters of the UNet by path, all or some; for a guided teacher with an input for its scale.

    What the base lacks is always trained.
    """
    c = config.full
    if OBJECTIVES[config.objective].teacher and not spec.w_dim:
        spec = dataclasses.replace(spec, w_dim=c.w_dim)
    tree = shapes.unet_shapes(spec, shapes.DTYPES[config.dtype])
    taken = {path: x for path, x in named(tree) if matches(c.trainable, path)}
    if not taken:
        raise InputError(f'no parameter matches full.trainable = {c.trainable!r}')
    there = dict(named(base))
    taken |= {path: x for path, x in named(tree) if path not in there}

    def init(key, params):
        have = dict(named(params))  # all but the new input, which starts without effect
        return {
            path: jnp.array(have[path], jnp.float32) if path in have else zeros(x, jnp.float32)
            for path, x in taken.items()
        }

    def bind(unet, trained, params):
        rest = dict(named(params))
        return unet(
            spec, map_named(lambda path, x: trained.get(path, rest.get(path)).astype(x.dtype), tree)
        )

    return Student(spec, init, bind, {}, whole=len(taken) == len(named(tree)))


STUDENTS = {'lora': lora_student, 'full': full_student}


def student_net(student, unet, trained, frozen, w=None):
    """-> net(z, t, **cond) of the student; w [B]: what a w-conditioned one is told."""
    net = student.bind(unet, trained, frozen.get('unet', {}))
    if not student.spec.w_dim:
        return net
    embedded = guidance_embedding(w, student.spec.w_dim)
    return lambda z, t, **cond: net(z, t, w=embedded, **cond)


def network(spec, params, mesh, remat='none'):
    """The UNet with these parameters as net(z, t, **cond); in strips on TPUs."""

    def net(z, t, **cond):
        def run(z):
            return apply_unet(UNet(spec, remat), params, z, t, **cond)

        return in_strips(run, z, spec.factor, samples_each(len(z), mesh))

    return net


def samples_each(n, mesh):
    """`for_strips` of each device's part of n samples."""
    return for_strips(max(1, n // sharding.groups(mesh)), mesh.devices.flat[0].platform)


def zeros(x, dtype=None):
    return jnp.zeros(x.shape, dtype or x.dtype)
