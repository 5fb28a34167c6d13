"""Read and write LoRA files: all of a file is placed on the model's modules, or none of it."""

import re
from collections import defaultdict

import jax.numpy as jnp
import numpy as np

from lcm_jax import weights
from lcm_jax.atomic import whole
from lcm_jax.errors import InputError, choose, nearest
from lcm_jax.lora_files import dialects, methods, peft_config
from lcm_jax.lora_files.family import family
from lcm_jax.lora_files.find import accelerates
from lcm_jax.tensors import open_tensors, write_tensors
from lcm_jax.tree import named

# Module of a model -> its path, its axes in the checkpoint in terms of ours, its shape there.
Spots = dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]


def modules(params) -> Spots:
    """The modules that LoRA can adapt, which have a kernel. Parameters may be abstract."""
    out = {}
    for path, w in named(params):
        if path.endswith('/kernel'):
            key, perm = weights.theirs(path, w.ndim)
            out[key.removesuffix('.weight')] = path, perm, tuple(w.shape[i] for i in perm)
    return out


def read_lora(file, models):
    """A LoRA file in any dialect -> ({component: adapter as in lora.py}, metadata).

    models: {component: parameters, may be abstract}, of 'unet', 'text_encoder', 'text_encoder_2'.
    The scales alpha / r are baked into `up`; factors are float32 numpy arrays. An
    adapter_config.json beside a file of peft's own is read too. Raises InputError naming the file: if
    a key belongs to no module or to a method that is not supported, if a tensor is given twice or
    is missing, if its shape does not fit, or if a value is not finite.
    """
    tensors, metadata = open_tensors(file)
    return place(tensors, peft_config.load(metadata, file), models, file), metadata


def read_terms(terms, models):
    """[(LoRA file, scale)] -> [({component: adapter}, scale)], whether one that accelerates takes part.

    Raises InputError as `read_lora` does.
    """
    found, fast = [], False
    for file, scale in terms:
        adapters, metadata = read_lora(file, models)
        found.append((adapters, float(scale)))
        fast |= bool(scale) and accelerates(file, metadata)
    return found, fast


def place(tensors, config, models, source):
    """{key: array or Tensor} and peft config of a LoRA file -> {component: adapter}.

    Raises InputError as `read_lora` does, naming `source`, and for a LoRA of SSD-1B given to SDXL, which
    has all of its modules and others between them.
    """
    spots = {part: modules(models[part]) for part in dialects.COMPONENTS if part in models}
    found = locate(tensors, spots, source)
    if family(tensors) == 'SSD-1B' and any(
        'mid_block.attentions' in x for x in spots.get('unet', ())
    ):
        raise InputError(f'{source}: this model is SDXL{_looks(tensors)}; nothing was loaded')
    options = {part: peft_config.options(config, part, source) for part in spots}
    adapters, bad = defaultdict(dict), defaultdict(list)
    for (component, module), roles in found.items():
        path, perm, shape = spots[component][module]
        arrays = {role: tensors[key] for role, (_, key) in roles.items()}
        try:
            up, down = methods.update(arrays, options[component], module, shape)
            adapters[component][path] = _pair(up, down, shape, perm)
        except methods.Misfit as e:
            bad[e.args[0]].append(f'{module} {e.args[1]}'.rstrip())
    if bad:
        said = '; '.join(listing(v, len(found), f'modules {k}') for k, v in bad.items())
        raise InputError(f'{source}: {said}{_looks(tensors)}; nothing was loaded')
    return dict(adapters)


def locate(keys, spots, source):
    """Keys of a LoRA file -> {(component, module): {role: (Part, key)}}; every key is placed.

    Raises InputError, naming `source`, as `read_lora` does for keys.
    """
    known = {
        (dialect, component): dialects.names(dialect, component, modules)
        for dialect in dialects.DIALECTS
        for component, modules in spots.items()
    }
    found, unknown, twice = defaultdict(dict), [], []
    for key in keys:
        hits = (
            (part, known[part.dialect, part.component].get(part.name))
            for part in dialects.parts(key)
            if part.component in spots
        )
        part, module = next((hit for hit in hits if hit[1]), (None, None))
        if part is None:
            unknown.append(key)
            continue
        roles = found[part.component, module]
        if part.role in roles:
            twice.append(' and '.join(sorted((roles[part.role][1], key))))
        roles[part.role] = part, key
    if not keys:
        raise InputError(f'{source} holds no tensors')
    if unknown:
        raise InputError(_strange(sorted(unknown), keys, known, source))
    if twice:
        raise InputError(f'{source}: {listing(twice, len(keys), "tensors are given twice")}')
    return found


def _pair(up, down, shape, perm):
    """up [out, r], down [r, n] -> {'down', 'up'} in the layout of our kernel."""
    down = np.transpose(down.reshape(-1, *shape[1:]), np.argsort(perm))
    return {'down': down, 'up': up.T.reshape(*(1,) * len(shape[2:]), *up.T.shape)}


def _strange(unknown, keys, known, source):
    """What to say of keys that belong to no module."""
    for pattern, other in dialects.OTHERS.items():
        those = [key for key in unknown if re.search(pattern, key)]
        if those:
            return (
                f'{source} holds {other} ({len(those)} tensors such as {those[0]}), which is '
                f'not supported in a LoRA file; nothing was loaded'
            )
    return (
        f'{source}: {listing(unknown, len(keys), "tensors belong to no module of this model")} '
        f'in any known dialect ({", ".join(dialects.DIALECTS)}){_nearest(unknown[0], known)}'
        f'{_looks(keys)}; nothing was loaded'
    )


def _nearest(key, known):
    spelled = [
        row.prefixes[component][0] + name + leaf
        for dialect, row in dialects.DIALECTS.items()
        for leaf in [leaf for leaf in row.leaves if key.endswith(leaf)][:1]
        for component in row.prefixes
        for name in known.get((dialect, component), ())
    ]
    return nearest(key, spelled)


def _looks(tensors):
    base = family(tensors)
    return f'; it looks like a LoRA for {base}' if base != 'unknown' else ''


def listing(names, total, kind):
    """'2 of 9 tensors (a, b)'; the first three names of many."""
    more = ', ...' if len(names) > 3 else ''
    return f'{len(names)} of {total} {kind} ({", ".join(names[:3])}{more})'


def write_lora(file, adapters, models, *, alpha, dialect=None, dtype=np.float16, metadata=None):
    """Write {component: adapter} for the models (as `read_lora` takes them); read it back; compare.

    dialect: 'kohya', 'kohya-sgm' or 'peft'; by default kohya with sgm names for SDXL and its kin,
    with diffusers names otherwise. There is one alpha in the file, and `up` is scaled by r / alpha,
    so that the file means the update of `adapters`. The file appears only if every factor reads
    back from the disk as it is, to the precision of `dtype`. Raises InputError otherwise, and for
    an unknown dialect, an alpha that is not positive and values that `dtype` does not hold.
    """
    sdxl = dialects.is_sdxl(models)
    dialect = dialect or ('kohya-sgm' if sdxl else 'kohya')
    choose('LoRA dialect to write', dialect, dialects.WRITTEN)
    with np.errstate(over='ignore'):  # becomes inf, which is refused
        alpha_said, alpha = alpha, np.asarray(alpha, dtype)
        if not 0 < alpha < np.inf:
            raise InputError(
                f'LoRA alpha = {alpha_said!r}; {alpha.dtype} files take a positive number'
            )
        tensors, ranks = _keyed(adapters, models, dialect, alpha, sdxl)
    over = [key for key, x in tensors.items() if not np.isfinite(x).all()]
    if over:
        said = listing(over, len(tensors), 'tensors hold values that are not finite')
        raise InputError(f'{file} in {alpha.dtype}: {said}')
    metadata = {**peft_config.metadata(dialect, ranks, float(alpha)), **(metadata or {})}
    with whole(file) as part:
        write_tensors(part, tensors, metadata)
        tensors, metadata = open_tensors(part)
        config, source = peft_config.load(metadata, part), f'{file} in {alpha.dtype}'
        _compare(place(tensors, config, models, source), adapters, alpha, file)


def _keyed(adapters, models, dialect, alpha, sdxl):
    """Adapters -> ({key: tensor} of a file with that alpha, {(component, module): rank})."""
    tensors, ranks = {}, {}
    for component, adapter in adapters.items():
        spots = modules(models[component])
        for name, module in dialects.DIALECTS[dialect].spell(component, spots).items():
            path, perm, _ = spots[module]
            if path in adapter:
                ranks[component, module] = adapter[path]['down'].shape[-1]
                values = _tensors(adapter[path], alpha, perm)
                for role in dialects.WRITTEN[dialect]:
                    key = dialects.key(dialect, component, name, role, sdxl)
                    tensors[key] = values[role]
    return tensors, ranks


def _tensors(ab, alpha, perm):
    """{'down', 'up'} -> {role: tensor in the file's layout and alpha's dtype}."""
    down, up = (np.transpose(np.asarray(ab[k], np.float32), perm) for k in ('down', 'up'))
    values = {'down': down, 'up': up * (len(down) / float(alpha)), 'alpha': alpha}
    return {role: np.asarray(x, alpha.dtype, order='C') for role, x in values.items()}


def _compare(back, adapters, alpha, file):
    """Raise InputError unless what was read back is what was to be written."""
    info = jnp.finfo(alpha.dtype)
    for component, adapter in adapters.items():
        if back.get(component, {}).keys() != adapter.keys():
            raise InputError(f'{file}: not all modules of the {component} read back')
        for path, ab in adapter.items():
            # Numbers that are subnormal in the file keep their absolute precision only.
            absolute = float(info.smallest_subnormal) * max(1.0, float(alpha) / ab['up'].shape[-2])
            for leaf, value in ab.items():
                got = back[component][path][leaf]
                if not np.allclose(got, value, rtol=2 * float(info.eps), atol=absolute):
                    raise InputError(f'{file}: {leaf} of {path} would not read back as it is')
