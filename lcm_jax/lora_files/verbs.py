"""LoRA files to LoRA files, for the models that they are for. Each function returns what it did."""

import functools
from pathlib import Path

import numpy as np

from lcm_jax.checkpoint import open_model
from lcm_jax.errors import InputError, choose
from lcm_jax.lora_files import algebra, dialects, methods, peft_config, programs
from lcm_jax.lora_files.files import locate, modules, place, read_terms, write_lora
from lcm_jax.lora_files.find import ACCELERATES, accelerates
from lcm_jax.scheduler import few_steps
from lcm_jax.tensors import open_tensors

ANEW = 'format', 'ss_network_', 'sshs_', peft_config.KEY  # metadata that describes the old form


def models_of(name):
    """A model's name or folder -> {component: its parameters as shapes}, of those LoRA adapts."""
    checkpoint = open_model(name)
    parts = [part for part in dialects.COMPONENTS if part in checkpoint.configs]
    return {part: checkpoint.shapes(part) for part in parts}


def convert_lora(file, out, model='emoji', dialect=None):
    """Write a LoRA file for `model` in another dialect, by default the model family's own.

    float16 stays float16, anything else becomes float32; alpha stays what it is, or becomes the
    rank where modules differ in it, with factors of like size. What accelerates is marked so in the
    metadata. Raises InputError if `out` is no .safetensors name or exists, or the file does not fit
    the model.
    """
    _accept(out)
    models = models_of(model)
    tensors, metadata = open_tensors(file)
    config = peft_config.load(metadata, file)
    adapters = place(tensors, config, models, file)
    found = locate(tensors, {part: modules(models[part]) for part in adapters}, file)
    alphas = {
        np.asarray(tensors[roles['alpha'][1]]).item()
        for roles in found.values()
        if 'alpha' in roles and methods.ranked(roles)
    }
    alphas |= {float(v) for key, v in config.items() if key.endswith('lora_alpha') and v}
    patterns = [x or {} for key, x in config.items() if key.endswith('alpha_pattern')]
    alphas |= {float(v) for pattern in patterns for v in pattern.values()}
    one = len(alphas) == 1
    adapters, alpha = (adapters, *alphas) if one else (_balanced(adapters), _rank(adapters))
    kept = {key: value for key, value in metadata.items() if not key.startswith(ANEW)}
    half = all(x.dtype == np.float16 for x in tensors.values())
    write_lora(
        out,
        adapters,
        models,
        alpha=alpha,
        dialect=dialect,
        dtype=np.float16 if half else np.float32,
        metadata=kept | _mark(accelerates(file, metadata)),
    )
    return f'wrote {out}: {_count(adapters)}'


def check_lora(file, model='emoji', target='diffusers'):
    """A LoRA file -> (text: how many of its modules a program loads, number that it drops).

    target: 'diffusers', 'comfyui' or 'a1111'. Raises InputError if the file does not fit the model.
    """
    choose('program', target, programs.PROGRAMS)
    models = models_of(model)
    spots = {part: modules(params) for part, params in models.items()}
    tensors, metadata = open_tensors(file)
    place(tensors, peft_config.load(metadata, file), models, file)  # refuses what does not fit
    found = locate(tensors, spots, file)
    dropped = programs.dropped(target, found, spots)
    text = f'{target} loads {len(found) - len(dropped)} of {len(found)} modules of {file}'
    if dropped:
        text += f'; it drops {", ".join(dropped[:3])}{", ..." if len(dropped) > 3 else ""}'
    return text, len(dropped)


def merge_loras(terms, out, model='emoji', rank=None, dialect=None):
    """Write the sum of LoRA files, [(file, scale)], as one file.

    Exact to float16, with ranks that add up; given `rank`, every module is brought down to it by SVD, and the
    relative error of the whole is told. A sum with an acceleration LoRA is one, its metadata says.
    Raises InputError as `convert_lora` does.
    """
    _accept(out, rank)
    models = models_of(model)
    files, fast = read_terms(terms, models)
    sums = {
        part: algebra.total([(file[part], scale) for file, scale in files if part in file])
        for part in models
        if any(part in file for file, _ in files)
    }
    said = ''
    if rank:
        norms = [algebra.norm(ab) for adapter in sums.values() for ab in adapter.values()]
        sums, errors = _each(functools.partial(algebra.truncated, rank=rank), sums)
        said = f', relative error {algebra.relative(errors, norms):.2e}'
    sums = _balanced(sums)
    write_lora(out, sums, models, alpha=_rank(sums), dialect=dialect, metadata=_mark(fast))
    return f'wrote {out}: {_count(sums)}, rank {_rank(sums)}{said}'


def extract_lora(base, tuned, out, rank, dialect=None):
    """Write the difference of two models' components as a LoRA of `rank`, by SVD.

    All layers with a kernel that differ are in it, convolutions too. Tells the relative error, and
    how much of the difference lies in what no LoRA holds (biases, norms, embeddings). What makes a
    few-step model of another accelerates, the metadata says. One tensor of each model is in memory
    at a time. Raises InputError if `out` is no .safetensors name or exists, or if the models do not
    fit each other or do not differ.
    """
    _accept(out, rank)
    models = models_of(base)
    if models_of(tuned) != models:
        raise InputError(f'{tuned} and {base} are not models of the same sizes')
    ckpts = [open_model(name) for name in (base, tuned)]
    already, fast = (few_steps(ckpt.scheduler) for ckpt in ckpts)
    adapters, errors, norms, rest = {}, [], [], []
    for part in models:
        before, after = (ckpt.tensors(part) for ckpt in ckpts)
        spots = modules(models[part])
        for key in before:
            delta = np.asarray(after[key], np.float32) - np.asarray(before[key], np.float32)
            size = float(np.linalg.norm(delta))
            path, perm, _ = spots.get(key.removesuffix('.weight'), (None, None, None))
            if size and path:
                kernel = delta.transpose(np.argsort(perm))
                adapters.setdefault(part, {})[path], error = algebra.factored(kernel, rank)
                errors.append(error)
                norms.append(size)
            elif size:
                rest.append(size)
    if not adapters:
        raise InputError(f'{tuned} and {base} differ in no layer that a LoRA can hold')
    metadata = _mark(fast and not already)
    write_lora(out, adapters, models, alpha=_rank(adapters), dialect=dialect, metadata=metadata)
    left = algebra.relative(rest, [*norms, *rest])
    return (
        f'wrote {out}: {_count(adapters)}, rank {_rank(adapters)}, relative error '
        f'{algebra.relative(errors, norms):.2e}; {len(rest)} other tensors differ (biases, norms, '
        f'embeddings), {left:.2e} of the whole difference'
    )


def _each(fn, adapters):
    """fn(ab) -> (ab, error) over adapters -> (adapters, errors)."""
    errors, out = [], {}
    for part, adapter in adapters.items():
        out[part] = {}
        for path, ab in adapter.items():
            out[part][path], error = fn(ab)
            errors.append(error)
    return out, errors


def _balanced(adapters):
    """{component: adapter} -> the same updates, by factors that half precision holds."""
    return {
        part: {path: algebra.balanced(ab) for path, ab in adapter.items()}
        for part, adapter in adapters.items()
    }


def _mark(fast):
    """The metadata of a LoRA that accelerates, or of another."""
    return {ACCELERATES: 'true'} if fast else {}


def _accept(out, rank=None):
    if Path(out).suffix != '.safetensors':
        raise InputError(f'{out}: the name must end in .safetensors')
    if Path(out).exists():
        raise InputError(f'{out} exists already; choose another name')
    if rank is not None and rank < 1:
        raise InputError(f'rank = {rank}; it must be 1 or more')


def _rank(adapters):
    return max(ab['down'].shape[-1] for adapter in adapters.values() for ab in adapter.values())


def _count(adapters):
    return ', '.join(f'{len(adapter)} modules of {part}' for part, adapter in adapters.items())
