"""What a run leaves for other programs: a LoRA file, or a whole model as a diffusers folder."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lcm_jax import weights
from lcm_jax.checkpoint import INDEX, open_folder
from lcm_jax.convert import few_step, write_diffusers
from lcm_jax.distill import OBJECTIVES, w_range
from lcm_jax.errors import InputError, choose
from lcm_jax.families import FAMILIES
from lcm_jax.lora_files.files import write_lora
from lcm_jax.models import shapes
from lcm_jax.tensors import read_json
from lcm_jax.tree import map_named

LCM = 'LatentConsistencyModelPipeline'
# What else is in a workdir.
RESERVED = ('cache', 'checkpoints', 'metrics.jsonl', 'preview', 'validation')


def check_name(name):
    """InputError for an export.name that would not be a file or folder of its own in the workdir."""
    plain = name and not name.startswith('.') and not {'/', '\\'} & {*name}
    if not plain or name.lower() in RESERVED:
        raise InputError(
            f'export.name = {name!r}; give a name in the workdir: without / and \\, not starting '
            f'with a dot, and none of {", ".join(RESERVED)}'
        )


def recipe(config, w_dim):
    """What a reader of the export should know: the objective, and the settings that it used, as text.

    w_dim: width of the student's guidance input, 0 where it has none.
    """
    objective = choose('objective', config.objective, OBJECTIVES)
    used = {
        'w': objective.teacher or w_dim,
        'solver': 'solver' in objective.settings,
        'solver_steps': objective.target,
        'skip': objective.target,
    }
    said = {k: str(config.distill[k]) for k in used if used[k] and config.distill[k]}
    if 'w' in said:  # the numbers of a preset, in the papers' convention: guidance - 1
        said['w'] = ':'.join(f'{w:g}' for w in dict.fromkeys(w_range(said['w'])))
    fast = {'accelerates': 'true'} if objective.target else {}
    return {'objective': config.objective} | fast | said


def export(out, trained, model, student, config):
    """Write what is trained, {path: ...} in numpy, without a suffix in `out` -> the path written.

    An adapter becomes OUT.safetensors (see `write_lora`), parameters the folder OUT, a whole model
    that takes the place of the base. Both appear whole or not at all.
    """
    if student.alphas:
        return export_lora(Path(f'{out}.safetensors'), trained, model, student.alphas, config)
    return export_folder(Path(out), trained, model, student.spec, config)


def export_lora(file, trained, model, alphas, config):
    """-> file, a LoRA with one alpha; the scale alpha / rank of each module is in its factors."""
    baked = {
        path: {'down': ab['down'], 'up': ab['up'] * (alphas[path][1] / alphas[path][0])}
        for path, ab in trained.items()
    }
    bases = {'unet': shapes.unet_shapes(model.specs['unet'])}
    alpha = max(alpha for _, alpha in alphas.values())
    said = recipe(config, model.specs['unet'].w_dim)
    metadata = {f'lcm_jax.{k}': value for k, value in said.items()}
    write_lora(file, {'unet': baked}, bases, alpha=alpha, metadata=metadata)
    return file


def export_folder(folder, trained, model, spec, config):
    """-> folder: the base model with this UNet in float32; a full LCM as diffusers' LCM
    pipeline, where it has one for the family.

    It takes the place of a model that is there; InputError for a folder of anything else, and unless
    the UNet reads back from the disk as it was written.
    """
    if folder.exists() and not (folder / INDEX).is_file():
        raise InputError(f'{folder} is there and holds no model: give another export.name')
    ckpt, part = model.checkpoint, Path(f'{folder}.part')
    found = {name: ckpt.tensors(name) for name in ckpt.configs if name != 'unet'}
    base = (
        ckpt.tensors('unet') if len(trained) < len(weights.keys(shapes.unet_shapes(spec))) else {}
    )
    found['unet'] = weights.unbind(_tree(trained, base, spec))
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    few = OBJECTIVES[config.objective].target
    write_diffusers(few_step(ckpt) if few else ckpt, found, part)
    index = {'_lcm_jax': recipe(config, spec.w_dim)}  # diffusers leaves such keys aside
    changes = {Path(INDEX): index}
    if spec.w_dim:
        changes[Path('unet', 'config.json')] = {'time_cond_proj_dim': spec.w_dim}
    if spec.w_dim and model.family.text_encoders == FAMILIES[LCM].text_encoders:
        index['_class_name'] = LCM  # SDXL's own class takes the guidance input
    for file, change in changes.items():
        text = json.dumps(read_json(part / file) | change, indent=2) + '\n'
        (part / file).write_text(text)
    back = open_folder(part).tensors('unet')
    for key, x in found['unet'].items():
        if not np.array_equal(np.array(back[key]), np.array(x)):
            raise InputError(f'{part}: unet {key} does not read back as it was written')
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def _tree(trained, base, spec):
    """{path: array} and the base's tensors -> the student's whole tree."""

    def leaf(path, x):
        if path in trained:
            return np.asarray(trained[path], np.float32)
        key, perm = weights.theirs(path, x.ndim)
        return base[key].transpose(np.argsort(perm)).astype(jnp.float32)

    return map_named(leaf, shapes.unet_shapes(spec))
