"""LoRA files: names in the dialects that programs read, and the scale alpha / r.

A dialect is a row: from a module's name in the checkpoint to its keys in the file. Files are read
by walking our own parameters, so that every module of the file is placed or the file is refused.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import weights
from lcm_jax.errors import InputError, choose, nearest
from lcm_jax.tree import named

# dialect -> (component, module) -> keys of down, up and alpha (None: alpha is in the metadata)
DIALECTS = {
    'kohya': lambda component, module: tuple(
        f'lora_{component}_{module.replace(".", "_")}.{leaf}'
        for leaf in ('lora_down.weight', 'lora_up.weight', 'alpha')
    ),
    'peft': lambda component, module: (
        *(f'{component}.{module}.{leaf}.weight' for leaf in ('lora_A', 'lora_B')),
        None,
    ),
}
PEFT_METADATA = 'lora_adapter_metadata'  # diffusers' key of the adapter's peft config, as JSON

# Part of a key -> the method it belongs to, whose update is not alpha / r * up down.
OTHER_METHODS = {
    'dora_scale': 'DoRA',
    'lora_magnitude_vector': 'DoRA',
    'lora_mid': 'LyCORIS LoCon',
    'hada_': 'LyCORIS LoHa',
    'lokr_': 'LyCORIS LoKr',
}
# Keys of the peft config that change the update, likewise.
OTHER_CONFIGS = ('use_dora', 'use_rslora', 'alpha_pattern')


def read_lora(file, params, component='unet'):
    """A LoRA file -> (adapter for `params` with its scales alpha / r baked into `up`, metadata).

    `params` may be abstract; factors are float32 numpy arrays. Raises InputError naming the file:
    if a key belongs to no module of the model or to another method than LoRA, if a factor is
    missing or its shape does not fit, or if a value is not finite.
    """
    tensors, metadata = weights.read_tensors(file)
    return _place(tensors, metadata, params, component, file), metadata


def write_lora(
    file, lora, *, alpha, component='unet', dialect='kohya', dtype=np.float16, metadata=None
):
    """Write an adapter, after checking that what will be written reads back as the same update.

    alpha is written for every module and `up` scaled by r / alpha, so that the file means the
    update of `lora`. Raises InputError, and writes nothing, for an unknown dialect, an alpha that
    is not positive, and values that `dtype` does not hold.
    """
    choose('LoRA dialect', dialect, DIALECTS)
    with np.errstate(over='ignore'):  # becomes inf, which is refused
        alpha_said, alpha = alpha, np.asarray(alpha, dtype)
        if not 0 < alpha < np.inf:
            raise InputError(
                f'LoRA alpha = {alpha_said!r}; {alpha.dtype} files take a positive number'
            )
        tensors, ranks = _tensors(lora, alpha, component, dialect)
    metadata = {**_metadata(dialect, component, ranks, float(alpha)), **(metadata or {})}
    shapes = {
        path: jax.ShapeDtypeStruct((*ab['down'].shape[:-1], ab['up'].shape[-1]), alpha.dtype)
        for path, ab in lora.items()
    }
    back = _place(tensors, metadata, shapes, component, f'{file} in {alpha.dtype}')
    info = jnp.finfo(alpha.dtype)
    for path, ab in lora.items():
        # Numbers that are subnormal in the file keep their absolute precision only.
        absolute = float(info.smallest_subnormal) * max(1.0, float(alpha) / ab['down'].shape[-1])
        for leaf, value in ab.items():
            if not np.allclose(back[path][leaf], value, rtol=2 * float(info.eps), atol=absolute):
                raise InputError(f'{file}: {leaf} of {path} would not read back as it is')
    weights.write_tensors(file, tensors, metadata)


def _tensors(lora, alpha, component, dialect):
    """Adapter -> ({key: tensor in alpha's dtype}, {module: rank}) of a file with that alpha."""
    tensors, ranks = {}, {}
    for path, ab in lora.items():
        key, perm = weights.theirs(path, ab['down'].ndim)
        module = key.removesuffix('.weight')
        ranks[module] = rank = ab['down'].shape[-1]
        down, up = (np.transpose(np.asarray(ab[k], np.float32), perm) for k in ('down', 'up'))
        values = down, up * (rank / float(alpha)), alpha
        for name, value in zip(DIALECTS[dialect](component, module), values, strict=True):
            if name:
                tensors[name] = np.asarray(value, alpha.dtype, order='C')
    return tensors, ranks


def _place(tensors, metadata, params, component, source):
    """Tensors of a LoRA file -> adapter for `params`; `source` is named in errors."""
    if not tensors:
        raise InputError(f'{source} holds no tensors')
    for key, (part, method) in itertools.product(tensors, OTHER_METHODS.items()):
        if part in key:
            raise InputError(
                f'{source} is a {method} file ({key}), which is not supported; nothing was loaded'
            )
    modules = []  # path, name, axes of the file in terms of ours, shape in the file
    for path, w in named(params):
        if path.endswith('/kernel'):
            key, perm = weights.theirs(path, w.ndim)
            shape = tuple(w.shape[i] for i in perm)
            modules.append((path, key.removesuffix('.weight'), perm, shape))
    # The dialect that explains most keys; it must explain all of them.
    tables = {d: {m: row(component, m) for _, m, _, _ in modules} for d, row in DIALECTS.items()}
    known = {d: {k for keys in table.values() for k in keys if k} for d, table in tables.items()}
    dialect = max(tables, key=lambda d: len(known[d] & tensors.keys()))
    unknown = sorted(tensors.keys() - known[dialect])
    if unknown:
        raise InputError(
            f'{source}: {len(unknown)} of {len(tensors)} tensors belong to no module of this model '
            f'in any known dialect ({", ".join(DIALECTS)}): {", ".join(unknown[:3])}'
            f'{nearest(unknown[0], known[dialect])}; nothing was loaded'
        )
    default_alpha = _metadata_alpha(metadata, component, source) if dialect == 'peft' else None
    lora = {}
    for path, module, perm, shape in modules:
        down, up, alpha = (tensors.get(key) for key in tables[dialect][module])
        if down is None and up is None and alpha is None:
            continue
        if down is None or up is None:
            lacks = [k for k in tables[dialect][module][:2] if k not in tensors]
            raise InputError(f'{source}: module {module} lacks {" and ".join(lacks)}')
        alpha = default_alpha if alpha is None else alpha
        lora[path] = _factors(down, up, alpha, perm, shape, f'{source}: module {module}')
    return lora


def _factors(down, up, alpha, perm, shape, source):
    """One module's tensors -> {'down', 'up'}; shape: of its weight in the file's axis order."""
    rank = down.shape[0] if down.ndim else 0
    if (
        not rank
        or down.shape[1:] != shape[1:]
        or up.shape != (shape[0], rank, *(1,) * len(shape[2:]))
    ):
        raise InputError(
            f'{source} has factors {down.shape} and {up.shape}, which do not fit the weight '
            f'of shape {shape}; is it a LoRA for another base model?'
        )
    alpha = np.float32(rank) if alpha is None else np.asarray(alpha, np.float32)
    if alpha.size != 1:
        raise InputError(f'{source} has an alpha of shape {alpha.shape}; it must be one number')
    down, up = (np.transpose(np.asarray(x, np.float32), np.argsort(perm)) for x in (down, up))
    if not all(np.isfinite(x).all() for x in (down, up, alpha)):
        raise InputError(f'{source} holds values that are not finite')
    return {'down': down, 'up': up * (alpha.item() / rank)}


def _metadata(dialect, component, ranks, alpha):
    """{module: rank} and alpha -> what the dialect's readers look for in the metadata."""
    rank = max(ranks.values())
    if dialect == 'kohya':
        return {
            'ss_network_module': 'networks.lora',
            'ss_network_dim': str(rank),
            'ss_network_alpha': str(alpha),
        }
    config = {
        'r': rank,
        'lora_alpha': alpha,
        'target_modules': sorted(ranks),
        'rank_pattern': {module: r for module, r in ranks.items() if r != rank},
    }
    return {PEFT_METADATA: json.dumps({f'{component}.{k}': v for k, v in config.items()})}


def _metadata_alpha(metadata, component, source):
    """alpha of a peft file, None if it says none (then alpha = r)."""
    try:
        config = json.loads(metadata.get(PEFT_METADATA, '{}'))
        alpha = config.get(f'{component}.lora_alpha')
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError) as e:
        raise InputError(f'{source}: {PEFT_METADATA} is not a peft config in JSON: {e}') from e
    for key in OTHER_CONFIGS:
        if config.get(f'{component}.{key}'):
            raise InputError(
                f'{source}: {key} in its {PEFT_METADATA} is not supported; nothing was loaded'
            )
    return alpha
