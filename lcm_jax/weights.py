"""Names and layouts of the published checkpoints: one table, walked along our tree, in both directions.

Submodules carry the checkpoint's own names, so a path with its '/' turned into '.' is the
checkpoint's key; what is left to say is the leaf's name and the order of its axes.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from lcm_jax.errors import InputError, nearest
from lcm_jax.sharding import put
from lcm_jax.tensors import lazy
from lcm_jax.tree import map_named, named

# (our path, their leaf, {rank: their axes in terms of ours}); first match wins.
RULES = (
    (r'.*/kernel', '.weight', {2: (1, 0), 4: (3, 2, 0, 1)}),  # IO -> OI, HWIO -> OIHW
    (r'.*/(embedding|scale)', '.weight', {1: (0,), 2: (0, 1)}),
    (r'.*/bias', '.bias', {1: (0,)}),
    (r'.*/running_mean', '.running_mean', {1: (0,)}),
    (r'.*/running_var', '.running_var', {1: (0,)}),
    (r'[^/]*', '', {1: (0,)}),  # a bare parameter, such as CLIP's class_embedding
)

# (regex, replacement): other spellings of a module on disk, undone where that gives a name we lack.
ALIASES = (
    # transformers 5 saves CLIPTextModel without the prefix that the published files have.
    (r'^(.*transformer\.)?(embeddings|encoder|final_layer_norm)\.', r'\1text_model.\2.'),
    # Attention of the AutoencoderKL files of Stable Diffusion 1 and 2 (before diffusers 0.15).
    (r'\.query\.', '.to_q.'),
    (r'\.key\.', '.to_k.'),
    (r'\.value\.', '.to_v.'),
    (r'\.proj_attn\.', '.to_out.0.'),
)

READERS = min(4, os.cpu_count())  # tensors on their way to a device at a time

# Keys of old files that hold no weights.
BUFFERS = re.compile(r'.*\.position_ids')


def theirs(path, ndim):
    """Our parameter path and rank -> (checkpoint key, permutation from our axes to theirs)."""
    for pattern, leaf, axes in RULES:
        if re.fullmatch(pattern, path) and ndim in axes:
            module = path.rsplit('/', 1)[0] if leaf else path
            return module.replace('/', '.') + leaf, axes[ndim]
    raise InputError(f'{path} of {ndim} axes is no parameter of a model')


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


def cover(want, tensors, source='checkpoint'):
    """{key: shape} and a file's {key: array or Tensor} -> {key: Tensor}, in the order of `want`.

    The two must cover each other exactly, but for ALIASES, BUFFERS and 1x1 convolutions that stand
    for products; otherwise one InputError names what is missing, what is unexpected and what has
    another shape. `source` is named in it. Nothing is read.
    """
    found = {_ours(k, want, tensors): x for k, x in tensors.items() if not BUFFERS.fullmatch(k)}
    for key, x in found.items():
        x = found[key] = lazy(x, f'{source}: {key}')
        shape = want.get(key, x.shape)
        if {x.ndim, len(shape)} == {2, 4} and (*x.shape, 1, 1)[:4] == (*shape, 1, 1)[:4]:
            found[key] = x.reshape(shape)
    have = found.keys()
    problems = {
        'missing': sorted(want.keys() - have),
        'unexpected': sorted(have - want.keys()),
        'misshapen': sorted(
            f'{k} {found[k].shape} instead of {want[k]}'
            for k in have & want.keys()
            if found[k].shape != want[k]
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
    return {key: found[key] for key in want}


def bind(abstract, tensors, source='checkpoint'):
    """{checkpoint key: array or Tensor} -> tree of Tensors shaped as `abstract`, in their own dtypes.

    Raises InputError as `cover` does. Nothing is read.
    """
    tensors = cover(keys(abstract), tensors, source)

    def leaf(path, x):
        key, perm = theirs(path, x.ndim)
        return tensors[key].transpose(np.argsort(perm))

    return map_named(leaf, abstract)


def unbind(tree):
    """Tree of arrays or Tensors -> {checkpoint key: Tensor}; the inverse of `bind`."""
    out = {}
    for path, x in named(tree):
        key, perm = theirs(path, x.ndim)
        out[key] = lazy(x, key).transpose(perm)
    return out


def load(abstract, tensors, source='checkpoint'):
    """{checkpoint key: array or Tensor} -> parameters shaped and typed as `abstract`, in numpy."""
    tree = bind(abstract, tensors, source)
    return jax.tree.map(lambda a, x: np.array(x.astype(a.dtype)), abstract, tree)


def dump(params):
    """Parameters -> {checkpoint key: array}; the inverse of `load`."""
    return {key: np.ascontiguousarray(x) for key, x in unbind(params).items()}


def place(tree, sharding=None):
    """Tree of Tensors -> the arrays on their devices; each is on the host only while it is read.

    sharding: None (the default device), a Sharding, or a tree of them, as in `jax.device_put`.
    """
    leaves, structure = jax.tree.flatten(tree)
    homes = jax.tree.broadcast(sharding, tree, is_leaf=lambda x: x is None)
    homes = jax.tree.leaves(homes, is_leaf=lambda x: x is None)

    def put_one(x, home):
        if home is not None and not home.is_fully_addressable:  # each process places its own part
            return put(np.array(x), home)
        return jax.device_put(np.asarray(x), home, may_alias=False).block_until_ready()

    with ThreadPoolExecutor(READERS) as pool:
        return jax.tree.unflatten(structure, pool.map(put_one, leaves, homes))
