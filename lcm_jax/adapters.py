"""LoRAs on a whole model: read from files, and summed onto its parameters."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax import lora as L
from lcm_jax.data.emoji import EMOJI
from lcm_jax.errors import InputError, nearest
from lcm_jax.lora_files.files import read_lora
from lcm_jax.tree import map_named

LORAS = {  # shipped
    'lcm': EMOJI / 'lcm_lora.safetensors',
    'fluent': EMOJI / 'fluent_lora.safetensors',
}


class Adapter(NamedTuple):
    """A loaded LoRA."""

    loras: dict[str, dict]  # component -> adapter, as `lora.init` makes it
    scale: float
    accelerates: bool  # made for few steps without guidance


def find(file):
    """A LoRA file, or a key of LORAS -> path. Raises InputError if there is none."""
    path = Path(LORAS.get(str(file), file))
    if not path.is_file():
        raise InputError(
            f'{str(file)!r} is neither a shipped LoRA ({", ".join(LORAS)})'
            f'{nearest(file, LORAS)} nor a file'
        )
    return path


def read_adapter(file, name, scale, params):
    """A LoRA file, or a key of LORAS, for the model with these parameters by component -> Adapter.

    It counts as an acceleration LoRA if its metadata says so or `name` contains 'lcm'. Raises
    InputError if there is no such file, or it does not fit as a whole.
    """
    loras, metadata = read_lora(find(file), params)
    accelerates = metadata.get('lcm_jax.accelerates') == 'true' or 'lcm' in name.lower()
    return Adapter(jax.tree.map(jnp.asarray, loras), scale, accelerates)


def term(text):
    """'style.safetensors:0.8' -> (file, scale); the scale is 1 if there is none."""
    file, colon, scale = text.rpartition(':')
    if not colon or '/' in scale or '\\' in scale:
        return text, 1.0
    try:
        return file, float(scale)
    except ValueError as e:
        raise InputError(f'{text}: {scale!r} is no scale; write FILE:SCALE, a number') from e


def merge(params, adapters):
    """Parameters by component, [Adapter] -> the parameters plus the sum of scale times update.

    The sum is taken in float32, whatever the parameters' dtype, and so does not depend on the order
    of the adapters beyond that. What no adapter touches is shared with `params`.
    """

    def merged(part, path, w):
        updates = [
            (a.loras[part][path], float(a.scale)) for a in adapters if path in a.loras.get(part, {})
        ]
        return _add(w, updates) if updates else w

    parts = {part for a in adapters for part in a.loras}
    return params | {
        part: map_named(lambda path, w, part=part: merged(part, path, w), params[part])
        for part in parts
    }


@jax.jit  # a small program for each shape of a kernel: seconds less to compile than one for all
def _add(w, updates):
    total = sum(scale * L.delta(ab).astype(jnp.float32) for ab, scale in updates)
    return (w.astype(jnp.float32) + total).astype(w.dtype)
