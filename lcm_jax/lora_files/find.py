"""What users call a LoRA -> its file, and whether it is one that accelerates."""

import math
import re
from pathlib import Path

from lcm_jax import hub
from lcm_jax.data.emoji import EMOJI
from lcm_jax.errors import InputError, nearest

LORAS = {  # shipped
    'lcm': EMOJI / 'lcm_lora.safetensors',
    'fluent': EMOJI / 'fluent_lora.safetensors',
}
SAVED_AS = 'pytorch_lora_weights.safetensors', 'adapter_model.safetensors'  # by diffusers, by peft
ACCELERATES = 'lcm_jax.accelerates'  # key of our metadata


def find(name):
    """A LoRA file, a folder or hub id with one, or a key of LORAS -> path. InputError if there is none."""
    path = Path(LORAS.get(str(name), name))
    if not path.exists() and path.suffix != '.safetensors' and hub.ID.fullmatch(str(name)):
        path = hub.download(str(name), lambda names: needed(names, name))
    if path.is_dir():
        there = [file.name for file in sorted(path.iterdir())]
        return path / needed(there, name)[0]
    if not path.is_file():
        raise InputError(
            f'{str(name)!r} is neither a shipped LoRA ({", ".join(LORAS)})'
            f'{nearest(name, LORAS)}, nor a file, nor a folder'
        )
    return path


def needed(names, source):
    """All file names of a folder or repository -> those of its LoRA, the weights first.

    They are called as usual, or the only ones. Raises InputError that names `source` if not.
    """
    usual = [name for name in SAVED_AS if name in names][:1]
    found = usual or [name for name in names if re.fullmatch(r'[^/]*\.safetensors', name)]
    if len(found) != 1:
        raise InputError(
            f'{source} holds {", ".join(found) or "no .safetensors file"}; name one LoRA file '
            '(of a hub repository, download it first)'
        )
    return [*found, *(name for name in names if name == 'adapter_config.json')]


def term(text):
    """'style.safetensors:0.8' -> (file, scale); the scale is 1 if there is none."""
    file, colon, scale = text.rpartition(':')
    if not colon or Path(text).exists() or '/' in scale or '\\' in scale:
        return text, 1.0
    try:
        by = float(scale)
    except ValueError:
        by = math.nan
    if not math.isfinite(by):
        raise InputError(f'{text}: {scale!r} is no scale; write FILE:SCALE, a number')
    return file, by


def accelerates(file, metadata, name=''):
    """Whether a LoRA file is made for few steps without guidance.

    Our metadata says so. Others are known by 'lcm' in `name` or the file's own; where that is the
    name of all LoRAs, by 'lcm-lora' in the name of its folder, or of its repository in the hub's cache.
    """
    file = Path(file).absolute()
    repositories = [part.rpartition('--')[2] for part in file.parts if part.startswith('models--')]
    named = [file.parent.name, *repositories] if file.name in SAVED_AS else []
    return (
        metadata.get(ACCELERATES) == 'true'
        or 'lcm' in f'{name} {file.stem}'.lower()
        or any(re.search('lcm[-_]lora', folder.lower()) for folder in named)
    )
