"""Models between diffusers folders, single files and orbax checkpoints; LoRA files between dialects."""

import json
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lcm_jax import lora_io, orbax_io, single, weights
from lcm_jax.checkpoint import COMPONENTS, INDEX, PARAMS, SCHEDULER, open_model
from lcm_jax.errors import InputError, choose

DTYPES = {'keep': None, 'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16}


def convert(source, out, to=None, dtype='keep', edit=None, prediction_type=None):
    """Write the model `source`, in any form that `open_model` opens, as `out` in the form `to`.

    to: a key of FORMS; by default 'original' for an `out` that ends in .safetensors, else 'orbax'
    for a diffusers folder and 'diffusers' for anything else. dtype is a key of DTYPES; 'keep' keeps
    every value to the last bit. edit: a function (component, {diffusers key: Tensor}) -> the same
    with other values, such as merged LoRAs. An orbax checkpoint is a diffusers folder with each
    component's Flax parameters, COMPONENT/params, in place of its weights.

    Tensors pass one by one. Returns a sentence that says what was done. Raises InputError, and
    leaves nothing behind, if `out` exists, if a component does not fit its config exactly, or if a
    tensor is not finite.
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
    found = {part: ckpt.tensors(part) for part in parts}
    if edit:
        found = {part: edit(part, tensors) for part, tensors in found.items()}
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
            found[part] = {k: _cast(x.map(seen), dtype) for k, x in tensors.items()}
        new = Path(staging) / out.name
        write(ckpt, found, new)
        new.rename(out)
    count = sum(x.size for tensors in found.values() for x in tensors.values())
    left = [part for part in ckpt.configs if part not in found]
    return (
        f'wrote {out}: {NAMES[to]}, {count:,} parameters in {", ".join(found)}'
        f'{"; that form has no place for " + ", ".join(left) if left else ""}'
    )


def _cast(x, dtype):
    return x.astype(dtype) if dtype and jnp.issubdtype(x.dtype, jnp.floating) else x


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
    weights.write_tensors(file, *single.pack(ckpt, found, texts))


def write_diffusers(ckpt, found, folder):
    """A model as a diffusers folder."""
    write_rest(ckpt, found, folder)
    for part, tensors in found.items():
        weights.write_tensors(folder / part / COMPONENTS[part][0], tensors)


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


def write_rest(ckpt, found, folder):
    """All of a folder but the weights: copied where the model is a folder, else made."""

    def weights_in(path, names):
        inside = Path(path).parent == ckpt.folder and Path(path).name in found
        return {n for n in names if inside and (not n.endswith('.json') or '.index.' in n)}

    if ckpt.folder.is_dir():
        shutil.copytree(ckpt.folder, folder, ignore=weights_in)
        return
    there = {*found, 'scheduler'}
    texts = {f'{part}/config.json': ckpt.configs[part] for part in found}
    texts[str(SCHEDULER)] = ckpt.scheduler
    texts = {path: json.dumps(x, indent=2) + '\n' for path, x in texts.items()}
    for name in (part.replace('text_encoder', 'tokenizer') for part in found if 'text' in part):
        there.add(name)
        texts |= {f'{name}/{file}': text for file, text in ckpt.tokenizer(name).texts().items()}
    index = {
        key: [None, None] if isinstance(x, list) and key not in there else x
        for key, x in ckpt.index.items()
    }
    texts[INDEX] = json.dumps(index, indent=2) + '\n'
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding='utf-8')


def factors(file):
    """A LoRA file -> dialect, (down, up, alpha), metadata; each of the three {module: array}.

    Needs no model. Raises InputError unless one dialect explains every key.
    """
    tensors, metadata = weights.read_tensors(file)
    tables = {}
    for dialect, keys_of in lora_io.DIALECTS.items():
        leaves = [key and key.partition('@')[2] for key in keys_of('unet', '@')]
        tables[dialect] = [
            {key.removesuffix(leaf): x for key, x in tensors.items() if leaf and key.endswith(leaf)}
            for leaf in leaves
        ]
    dialect = max(tables, key=lambda name: sum(map(len, tables[name])))
    strange = len(tensors) - sum(map(len, tables[dialect]))
    if strange or not tensors:
        dialects, keys = ', '.join(lora_io.DIALECTS), ', '.join([*tensors][:3])
        raise InputError(
            f'{file}: {strange} of {len(tensors)} tensors are no LoRA factors in a known dialect '
            f'({dialects}); the first keys are {keys}'
        )
    return dialect, tables[dialect], metadata


def inspect_lora(file):
    """A LoRA file -> what is in it, as text. Raises InputError if it is not one."""
    dialect, (down, up, alpha), metadata = factors(file)
    arrays = (*down.values(), *up.values())
    said = {
        'file': file,
        'dialect': dialect,
        'modules': f'{len(down.keys() & up.keys())} (incomplete: {len(down.keys() ^ up.keys())})',
        'rank': listed(x.shape[0] for x in down.values()),
        'alpha': listed(float(x) for x in alpha.values()) or 'not among the tensors',
        'parameters': f'{sum(x.size for x in arrays):,}',
        'dtype': ', '.join(sorted({str(x.dtype) for x in arrays})),
        'metadata': f'{len(metadata)} entries',
    }
    lines = [f'{key:<12}{value}' for key, value in said.items()]
    return '\n'.join(lines + [f'  {key}: {value}' for key, value in sorted(metadata.items())])


def listed(numbers):
    """Numbers -> their distinct values as text, such as '16' or '4, 8, 12, ... (9 values)'."""
    values = sorted(set(numbers))
    text = ', '.join(f'{v:g}' for v in values[:3])
    return text if len(values) <= 3 else f'{text}, ... ({len(values)} values)'


def convert_lora(file, out, model='emoji', dialect='kohya'):
    """Write a LoRA file for the UNet of `model` in another dialect; returns what was done.

    float16 stays float16, anything else becomes float32; alpha becomes the rank unless all tensors
    of alpha agree. Raises InputError if `out` is no .safetensors name or the LoRA does not fit.
    """
    if Path(out).suffix != '.safetensors':
        raise InputError(f'{out}: the name must end in .safetensors')
    abstract = open_model(model).shapes('unet')
    lora, metadata = lora_io.read_lora(file, abstract)
    _, (down, _, alpha), _ = factors(file)
    alphas = {float(x) for x in alpha.values()}
    alpha = float(alphas.pop() if len(alphas) == 1 else max(x.shape[0] for x in down.values()))
    dtype = np.float16 if all(x.dtype == np.float16 for x in down.values()) else np.float32
    anew = 'format', 'ss_network_', 'sshs_', lora_io.PEFT_METADATA  # these describe the old form
    kept = {key: value for key, value in metadata.items() if not key.startswith(anew)}
    lora_io.write_lora(out, lora, alpha=alpha, dialect=dialect, dtype=dtype, metadata=kept)
    return f'wrote {out}: {len(lora)} modules in the {dialect} dialect'
