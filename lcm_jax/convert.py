"""Models between diffusers folders and orbax checkpoints."""

import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp

from lcm_jax import weights
from lcm_jax.checkpoint import COMPONENTS, open_folder
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
