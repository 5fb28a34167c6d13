"""Models between diffusers folders, single files and orbax checkpoints."""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lcm_jax import lora, orbax_io, single, weights
from lcm_jax.checkpoint import COMPONENTS, INDEX, PARAMS, SCHEDULER, open_folder, open_model
from lcm_jax.errors import InputError, choose
from lcm_jax.lora_files.dialects import COMPONENTS as LORA_COMPONENTS
from lcm_jax.lora_files.files import read_terms
from lcm_jax.tensors import finite, write_tensors
from lcm_jax.tree import named

# What is copied from the root of a model's folder, beside what its index names.
KEPT = re.compile(
    r'.*\.(json|md|txt)|(licen[cs]e|notice|copying)\b.*'
    r'|tokenizer.*|scheduler|feature_extractor|safety_checker',
    re.IGNORECASE,
)
DTYPES = {'keep': None, 'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16}


def convert(source, out, to=None, dtype='keep', loras=(), prediction_type=None):
    """Write the model `source`, in any form that `open_model` opens, as `out` in the form `to`.

    to: a key of FORMS; by default 'original' for an `out` that ends in .safetensors, else 'orbax'
    for a diffusers folder and 'diffusers' for anything else. dtype is a key of DTYPES; 'keep' keeps
    every value to the last bit. loras: (LoRA file, scale) pairs whose updates are added. An orbax
    checkpoint is a diffusers folder with each component's Flax parameters, COMPONENT/params, in
    place of its weights.

    Tensors pass one by one. Returns a sentence that says what was done. Raises InputError, and
    leaves nothing behind, if `out` exists, if a component does not fit its config exactly, if a
    LoRA does not fit the model as a whole, or if a tensor is not finite.
    """
    source, out, dtype = str(source), Path(out), choose('dtype', dtype, DTYPES)
    folder = Path(source) if Path(source).is_dir() else None
    if out.exists() or (folder and folder.resolve() in out.resolve().parents):
        raise InputError(f'{out} exists already or lies in {source}; choose another name')
    ckpt = open_model(source, prediction_type)
    to = to or default_form(ckpt, out)
    write = choose('form', to, FORMS)
    if (to == 'original') != (out.suffix == '.safetensors'):
        raise InputError(
            f'{out}: a name ends in .safetensors if, and only if, the form is original'
        )
    parts = single.places(ckpt.configs) if to == 'original' else ckpt.configs
    own = {part: ckpt.tensors(part) for part in parts}
    found, fast = baked(ckpt, own, loras)
    found = {
        part: {key: _cast(x, dtype or own[part][key].dtype) for key, x in tensors.items()}
        for part, tensors in found.items()
    }
    ckpt = few_step(ckpt) if fast else ckpt
    total = sum(x.nbytes for tensors in found.values() for x in tensors.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tqdm(total=total, unit='B', unit_scale=True, desc=out.name, disable=None) as bar,
        tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as staging,
    ):

        def seen(x):
            bar.update(x.nbytes)
            return x

        for part, tensors in found.items():
            found[part] = {key: x.map(seen) for key, x in tensors.items()}
        new = Path(staging) / out.name
        write(ckpt, found, new)
        new.rename(out)
    count = sum(x.size for tensors in found.values() for x in tensors.values())
    own_name = to == 'original' and ckpt.configs.get('unet', {}).get('time_cond_proj_dim')
    left = [part for part in ckpt.configs if part not in found]
    return (
        f'wrote {out}: {NAMES[to]}, {count:,} parameters in {", ".join(found)}'
        f'{"; that form has no place for " + ", ".join(left) if left else ""}'
        f'{"; it draws in 2 to 8 steps of the LCM sampler, at guidance 1" if fast else ""}'
        f'{"; other programs do not know the guidance input of such a file" if own_name else ""}'
    )


def _cast(x, dtype):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def baked(ckpt, found, loras):
    """{component: {key: Tensor}} of a model, [(LoRA file, scale)] -> the same with the LoRAs added,
    and whether one of them accelerates.

    The sum is taken when a tensor is read, and stays in float32. Raises InputError if a file does not
    fit, and then if a sum is not finite.
    """
    if not loras:
        return found, False
    models = {part: ckpt.shapes(part) for part in LORA_COMPONENTS if part in found}
    adapters, fast = read_terms(loras, models)

    def added(path, ndim, terms, x):
        key, perm = weights.theirs(path, ndim)
        updates = lora.updates_of(path, terms)
        if not updates:
            return key, x[key]

        def add(w):
            y = lora.add(w.transpose(np.argsort(perm)), updates).transpose(perm)
            if not finite(y):
                raise InputError(f'{x[key].name}: with the LoRAs added it is not finite')
            return y

        return key, x[key].astype(np.float32).map(add)

    for part, params in models.items():
        terms = [(a[part], scale) for a, scale in adapters if part in a]
        tensors = (added(path, w.ndim, terms, found[part]) for path, w in named(params))
        found = found | {part: dict(tensors)}
    return found, fast


def few_step(ckpt):
    """A Checkpoint -> the same, drawn by the LCM sampler in diffusers and here."""
    index = ckpt.index and ckpt.index | {'scheduler': ['diffusers', 'LCMScheduler']}
    scheduler = ckpt.scheduler | {'_class_name': 'LCMScheduler'}
    return dataclasses.replace(ckpt, index=index, scheduler=scheduler)


def default_form(ckpt, out):
    """The form that `convert` writes unless it is told."""
    if out.suffix == '.safetensors':
        return 'original'
    folder = ckpt.folder.is_dir() and not any(ckpt.folder.glob(f'*/{PARAMS}'))
    return 'orbax' if folder else 'diffusers'


def write_single(ckpt, found, file):
    """A model as one file in original names."""
    layout, texts = single.layout_for(ckpt.configs), {}
    for name in (part.replace('text_encoder', 'tokenizer') for part in found if 'text' in part):
        tokenizer = ckpt.tokenizer(name)
        if not tokenizer.is_clip(single.pad(layout, name)):
            texts |= {f'{name}/{file}': text for file, text in tokenizer.texts().items()}
    write_tensors(file, *single.pack(ckpt, found, texts))


def write_diffusers(ckpt, found, folder):
    """A model as a diffusers folder."""
    write_rest(ckpt, found, folder)
    for part, tensors in found.items():
        write_tensors(folder / part / COMPONENTS[part][0], tensors)


def write_orbax(ckpt, found, folder):
    """A model as an orbax checkpoint."""
    write_rest(ckpt, found, folder)
    for part, tensors in found.items():
        orbax_io.write_tree(folder / part / PARAMS, weights.bind(ckpt.shapes(part), tensors))


FORMS = {'diffusers': write_diffusers, 'original': write_single, 'orbax': write_orbax}
NAMES = {
    'diffusers': 'diffusers folder',
    'original': 'single file in original names',
    'orbax': 'orbax checkpoint',
}


def index_of(ckpt, there):
    """model_index.json of a model of which these parts are there; the safety checker may not be, as
    a repository's is not downloaded.
    """
    index = {
        key: [None, None] if isinstance(x, list) and key not in there else x
        for key, x in ckpt.index.items()
    }
    if index.get('requires_safety_checker') and 'safety_checker' not in there:
        index['requires_safety_checker'] = False
    return index


def write_rest(ckpt, found, folder):
    """All of a model's folder but the weights: copied where the model is a folder, else made."""

    def left(path, names):
        """Weights, hidden files, and at the root what is no part of the model."""
        path = Path(path)
        if path == ckpt.folder:
            kept = {n for n in names if KEPT.fullmatch(n)} | ckpt.index.keys() | COMPONENTS.keys()
        elif path.parent == ckpt.folder and path.name in found:
            kept = {n for n in names if n.endswith('.json') and '.index.' not in n}
        else:
            kept = {*names}
        return {n for n in names if n not in kept or n.startswith('.')}

    if ckpt.folder.is_dir():
        shutil.copytree(ckpt.folder, folder, ignore=left)
        copied = open_folder(folder)
        for file, mine, theirs in (
            (SCHEDULER, ckpt.scheduler, copied.scheduler),
            (INDEX, index_of(ckpt, {p.name for p in folder.iterdir()}), copied.index),
        ):
            if mine != theirs:  # another prediction type, few steps, or parts that are not there
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(json.dumps(mine, indent=2) + '\n')
        return
    there = {*found, 'scheduler'}
    texts = {f'{part}/config.json': ckpt.configs[part] for part in found}
    texts[str(SCHEDULER)] = ckpt.scheduler
    texts = {path: json.dumps(x, indent=2) + '\n' for path, x in texts.items()}
    for name in (part.replace('text_encoder', 'tokenizer') for part in found if 'text' in part):
        there.add(name)
        texts |= {f'{name}/{file}': text for file, text in ckpt.tokenizer(name).texts().items()}
    texts[INDEX] = json.dumps(index_of(ckpt, there), indent=2) + '\n'
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding='utf-8')
