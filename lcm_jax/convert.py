"""Models between diffusers folders and orbax checkpoints; LoRA files between dialects."""

import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lcm_jax import lora_io, weights
from lcm_jax.checkpoint import COMPONENTS, open_folder, open_model
from lcm_jax.errors import InputError, choose
from lcm_jax.tree import count

PARAMS = 'params'  # in a component's folder: its Flax tree, in place of the weights file
DTYPES = {'keep': None, 'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16}


def convert(source, out, dtype='keep'):
    """Write the diffusers folder `source` as an orbax checkpoint `out`, or the other way round.

    A checkpoint is the same folder with each component's Flax parameters, COMPONENT/params, in
    place of its weights file; everything else is copied. dtype is a key of DTYPES; 'keep' keeps
    every value to the last bit. Returns a sentence that says what was done. Raises InputError, and
    writes nothing, if `out` exists or if a component does not fit its config.json exactly.
    """
    source, out, dtype = Path(source), Path(out), choose('dtype', dtype, DTYPES)
    if not source.is_dir():
        raise InputError(f'no such folder: {source}')
    if out.exists() or source.resolve() in out.resolve().parents:
        raise InputError(f'{out} exists already or lies in {source}; name another folder')
    parts = [name for name in COMPONENTS if (source / name / 'config.json').is_file()]
    flax = [name for name in parts if (source / name / PARAMS).is_dir()]
    if not parts or flax not in ([], parts):
        raise InputError(
            f'{source} is neither a diffusers folder nor a checkpoint of one: '
            f'of {", ".join(COMPONENTS)} it has {parts}, with {PARAMS}/ {flax}'
        )
    files = {name: source / name / (PARAMS if flax else COMPONENTS[name][0]) for name in parts}

    def converted(folder, names):
        return {name for name in names if Path(folder, name) in files.values()}

    total = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as part:
        new = Path(part) / out.name
        shutil.copytree(source, new, ignore=converted)
        for name, file in files.items():
            tensors = read_tree(file) if flax else weights.read_tensors(file)[0]
            abstract = open_folder(source).shapes(name, dtype or dtype_of(tensors, file))
            params = weights.load(abstract, tensors, file)
            total += count(params)
            if flax:
                weights.write_tensors(new / name / COMPONENTS[name][0], weights.dump(params))
            else:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save((new / name / PARAMS).resolve(), params)
        new.rename(out)
    form = 'diffusers folder' if flax else 'orbax checkpoint'
    return f'wrote {out}: {form}, {total:,} parameters in {", ".join(parts)}'


def read_tree(folder):
    """Orbax checkpoint of a component -> {checkpoint key: array}. InputError naming the folder."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return weights.dump(checkpointer.restore(folder.resolve()))
    except Exception as e:  # orbax and tensorstore raise many types for a damaged checkpoint
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(f'{folder} is not a readable orbax checkpoint: {said}') from e


def dtype_of(tensors, source):
    """The one dtype of a file's weights. InputError if there are several."""
    dtypes = {x.dtype for key, x in tensors.items() if not weights.BUFFERS.fullmatch(key)}
    if len(dtypes) > 1:
        both = ' and '.join(sorted(map(str, dtypes)))
        raise InputError(f'{source} holds both {both}; choose one dtype')
    return dtypes.pop() if dtypes else jnp.float32


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
