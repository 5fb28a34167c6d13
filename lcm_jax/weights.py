"""Names and layouts of the published checkpoints: one table, walked along our tree, in both directions.

Submodules carry the checkpoint's own names, so a path with its '/' turned into '.' is the
checkpoint's key; what is left to say is the leaf's name and the order of its axes.
"""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy

from lcm_jax.errors import InputError, nearest
from lcm_jax.tree import named

# (our path, their leaf, {rank: their axes in terms of ours}); first match wins.
RULES = (
    (r'.*/kernel', '.weight', {2: (1, 0), 4: (3, 2, 0, 1)}),  # IO -> OI, HWIO -> OIHW
    (r'.*/(embedding|scale)', '.weight', {1: (0,), 2: (0, 1)}),
    (r'.*/bias', '.bias', {1: (0,)}),
    (r'[^/]*', '', {1: (0,)}),  # a bare parameter, such as CLIP's class_embedding
)

# (regex, replacement): other spellings of a module on disk, undone where that gives a name we lack.
ALIASES = (
    # transformers 5 saves CLIPTextModel without the prefix that the published files have.
    (r'^(embeddings|encoder|final_layer_norm)\.', r'text_model.\1.'),
    # Attention of the AutoencoderKL files of Stable Diffusion 1 and 2 (before diffusers 0.15).
    (r'\.query\.', '.to_q.'),
    (r'\.key\.', '.to_k.'),
    (r'\.value\.', '.to_v.'),
    (r'\.proj_attn\.', '.to_out.0.'),
)

# Keys of old files that hold no weights.
BUFFERS = re.compile(r'.*\.position_ids')


def theirs(path, ndim):
    """Our parameter path and rank -> (checkpoint key, permutation from our axes to theirs)."""
    for pattern, leaf, axes in RULES:
        if re.fullmatch(pattern, path):
            module = path.rsplit('/', 1)[0] if leaf else path
            return module.replace('/', '.') + leaf, axes[ndim]
    raise KeyError(path)


def keys(abstract):
    """Tree -> {checkpoint key: checkpoint shape}."""
    out = {}
    for path, x in named(abstract):
        key, perm = theirs(path, x.ndim)
        out[key] = tuple(x.shape[i] for i in perm)
    return out


def _ours(key, want, have):
    """A file's key -> the key of `want` that it is an alias of, else itself."""
    if key not in want:
        for pattern, name in ALIASES:
            alias = re.sub(pattern, name, key)
            if alias in want and alias not in have:
                return alias
    return key


def load(abstract, tensors, source='checkpoint'):
    """{checkpoint key: array} -> parameters shaped and typed as `abstract`.

    The two must cover each other exactly; otherwise one InputError names what is missing, what is
    unexpected and what has another shape. `source` is named in it.
    """
    want = keys(abstract)
    tensors = {_ours(k, want, tensors): x for k, x in tensors.items() if not BUFFERS.fullmatch(k)}
    have = tensors.keys()
    problems = {
        'missing': sorted(want.keys() - have),
        'unexpected': sorted(have - want.keys()),
        'misshapen': sorted(
            f'{k} {tuple(tensors[k].shape)} instead of {want[k]}'
            for k in have & want.keys()
            if tuple(tensors[k].shape) != want[k]
        ),
    }
    if any(problems.values()):
        said = []
        for what, which in problems.items():
            if which:
                hint = nearest(which[0], want) if what == 'unexpected' else ''
                said.append(
                    f'{len(which)} {what}: {", ".join(which[:3])}'
                    f'{", ..." if len(which) > 3 else ""}{hint}'
                )
        raise InputError(
            f'{source} does not fit the model of {len(want)} tensors: {"; ".join(said)}'
        )
    leaves = []
    for path, x in named(abstract):
        key, perm = theirs(path, x.ndim)
        leaves.append(np.transpose(tensors[key], np.argsort(perm)).astype(x.dtype))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def dump(params):
    """Parameters -> {checkpoint key: array}; the inverse of `load`."""
    out = {}
    for path, x in named(params):
        key, perm = theirs(path, x.ndim)
        out[key] = np.ascontiguousarray(np.transpose(np.asarray(x), perm))
    return out


def read_tensors(file):
    """A .safetensors file -> ({key: numpy array}, metadata). Raises InputError naming the file."""
    if not os.path.isfile(file):
        raise InputError(f'no such file: {file}')
    try:
        with safetensors.safe_open(file, framework='np') as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118 (a safe_open is no dict)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as e:
        raise InputError(f'{file} is not a readable safetensors file: {e}') from e


def write_tensors(file, tensors, metadata=None):
    """Write a .safetensors file; it appears whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + '.part')
    safetensors.numpy.save_file(tensors, part, metadata={'format': 'pt', **(metadata or {})})
    os.replace(part, file)


def read_json(file):
    """A .json file -> its value. Raises InputError naming the file."""
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as e:
        raise InputError(f'cannot read {file}: {e}') from e
