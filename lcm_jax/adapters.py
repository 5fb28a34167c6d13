"""LoRAs on a whole model: read from files, and summed onto its parameters."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax import lora as L
from lcm_jax.errors import InputError
from lcm_jax.lora_files.files import read_lora
from lcm_jax.lora_files.find import accelerates, find
from lcm_jax.tree import named


class Adapter(NamedTuple):
    """A loaded LoRA."""

    loras: dict[str, dict]  # component -> adapter, as `lora.init` makes it or `_held` keeps it
    scale: float
    accelerates: bool  # made for few steps without guidance


def read_adapter(lora, name, scale, params):
    """What `find` takes, for the model with these parameters by component -> Adapter.

    `name` may tell that it accelerates, see `accelerates`. Raises InputError if there is no such
    LoRA, it does not fit as a whole, or its scale is none, see `scaled`.
    """
    file = find(lora)
    loras, metadata = read_lora(file, params)
    held = {}
    for part, lora in loras.items():
        kernels = dict(named(params[part]))
        held[part] = {path: _held(ab, kernels[path]) for path, ab in lora.items()}
    return scaled(Adapter(held, 1.0, accelerates(file, metadata, name)), scale)


def scaled(adapter, scale):
    """The Adapter at another scale; InputError unless that is a finite number."""
    try:
        by = float(scale)
    except (TypeError, ValueError):
        by = math.nan
    if not math.isfinite(by):
        raise InputError(f'scale {scale!r} of a LoRA; give a number')
    return adapter._replace(scale=by)


def _held(ab, w):
    """A pair as it is kept beside its kernel: {'full'} in its dtype where the factors are larger.

    Such is the update of a LoKr with whole matrices, and of a LoHa of a high rank.
    """
    larger = ab['down'].size + ab['up'].size > w.size
    ab = jax.tree.map(jnp.asarray, ab)
    return {'full': L.delta(ab).astype(w.dtype)} if larger else ab


def merge(params, adapters):
    """Parameters by component, [Adapter] -> the parameters with all of them added, see `lora.merge`.

    What no adapter touches is shared with `params`.
    """

    def merged(part):
        terms = [(a.loras[part], a.scale) for a in adapters if part in a.loras]
        return L.merge(params[part], terms)

    return params | {part: merged(part) for part in {part for a in adapters for part in a.loras}}
