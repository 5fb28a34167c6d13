"""Whole models in one file with the original (CompVis, sgm) names: Stable Diffusion 1, 2, XL and SSD-1B."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lcm_jax import infer, original, weights
from lcm_jax.diffusion import KINDS
from lcm_jax.errors import InputError, choose
from lcm_jax.tensors import Tensor
from lcm_jax.text import END

MODEL = 'lcm_jax.model'  # our metadata: configs, index, scheduler and tokenizers of the model, JSON

# Keys that hold nothing a model needs: EMA copies, noise schedules, training leftovers.
NOTHING = re.compile(
    r'(model_ema|embedding_manager|denoiser)\..*|first_stage_model\.(loss|model_ema)\..*'
    r'|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|posterior_\w+'
    r'|lvlb_weights|logvar|scale_factor|v_pred|ztsnr'
    r'|(.*\.)?(logit_scale|position_ids|attn_mask)'
    r'|(cond_stage_model|conditioner\.embedders\.0)(\.transformer)?\.text_projection(\.weight)?'
)

REFINER = 'a refiner of Stable Diffusion XL, which is not supported'


class Part(NamedTuple):
    """Where a component lies in the file: the start of its keys, and their names after that."""

    prefix: str
    names: Callable  # all its diffusers keys -> {diffusers key: original key}


def _same(names):
    return {name: name for name in names}


UNET = Part('model.diffusion_model.', original.unet_modules)
VAE = Part('first_stage_model.', original.vae_modules)
SD1, SD2, SDXL = 'Stable Diffusion 1', 'Stable Diffusion 2', 'Stable Diffusion XL'
LAYOUTS = {
    SD1: {
        'unet': UNET,
        'vae': VAE,
        'text_encoder': Part('cond_stage_model.transformer.', _same),
    },
    SD2: {
        'unet': UNET,
        'vae': VAE,
        'text_encoder': Part('cond_stage_model.model.', original.open_clip_parameters),
    },
    SDXL: {
        'unet': UNET,
        'vae': VAE,
        'text_encoder': Part('conditioner.embedders.0.transformer.', _same),
        'text_encoder_2': Part('conditioner.embedders.1.model.', original.open_clip_parameters),
    },
}


def to_original(part, found):
    """A component's whole {diffusers key: Tensor} -> {original key: Tensor}."""
    groups = {}
    for key, name in part.names(found).items():
        groups.setdefault(part.prefix + name, []).append(found[key])
    return {key: _joined(key, xs) for key, xs in groups.items()}


def _joined(key, xs):
    """The tensors of diffusers that make one original tensor -> it."""
    x = xs[0]
    if len(xs) == 3:  # q, k, v
        dtype = x.dtype if {y.dtype for y in xs} == {x.dtype} else np.float32
        x, *more = (y.astype(dtype) for y in xs)
        shape = (3 * x.shape[0], *x.shape[1:])
        return x.map(lambda q: np.concatenate([q, *map(np.asarray, more)]), shape)
    if key.endswith('.text_projection'):
        return x.transpose((1, 0))
    if original.VAE_ATTENTION.fullmatch(key):
        return x.reshape((*x.shape, 1, 1))
    return x


def from_original(part, shapes, found):
    """{diffusers key: shape} and the file's {original key: Tensor} -> {diffusers key: Tensor}."""
    taken, out = {}, {}
    for key, name in part.names(shapes).items():
        x, shape = found[part.prefix + name], shapes[key]
        start = taken.get(name, 0)
        taken[name] = start + shape[0]
        out[key] = _part_of(name, x, shape, start)
    return out


def _part_of(name, x, shape, start):
    """The tensor of diffusers that begins at row `start` of an original one."""
    if name.endswith('text_projection'):
        return x.transpose((1, 0))
    if x.shape[0] != shape[0]:
        return x.map(lambda x: x[start : start + shape[0]], shape)
    return x.reshape(shape) if x.shape != shape else x


def original_shapes(part, shapes):
    """{diffusers key: shape} of a component -> {original key: shape}."""
    dummies = {key: Tensor(key, shape, np.dtype(np.float32), None) for key, shape in shapes.items()}
    return {key: x.shape for key, x in to_original(part, dummies).items()}


def unified(found, source):
    """A file's {key: Tensor} -> the same, with all in the places of LAYOUTS.

    A VAE alone in its file has no prefix, and SD 2's text encoder may be in sgm's place (SD-Turbo). Raises
    InputError for SDXL's refiner, whose encoder is there too.
    """
    if 'encoder.down.0.block.0.conv1.weight' in found:
        return {VAE.prefix + key: x for key, x in found.items()}
    sgm = 'conditioner.embedders.0.model.'
    if not any(key.startswith(sgm) for key in found):
        return found
    if any(key.startswith(f'{UNET.prefix}label_emb.') for key in found):
        raise InputError(f'{source} is {REFINER}')
    own = LAYOUTS[SD2]['text_encoder'].prefix
    return {own + k.removeprefix(sgm) if k.startswith(sgm) else k: x for k, x in found.items()}


def recognise(keys, source):
    """Keys of a file -> (layout's name, {component: Part} of those it has). InputError for none."""

    def has(layout):
        return {c: p for c, p in layout.items() if any(k.startswith(p.prefix) for k in keys)}

    name, parts = max(((n, has(x)) for n, x in LAYOUTS.items()), key=lambda row: len(row[1]))
    if not parts:
        raise InputError(
            f'{source} has no key of the original {", ".join(LAYOUTS)} or SSD-1B; '
            f'the first are {", ".join(sorted(keys)[:3])}'
        )
    return name, parts


def describe(found, metadata, source, prediction_type=None):
    """A file's {key: Tensor} -> (layout's name, {component: Part}, {'configs', 'index', 'scheduler', ...}).

    The last is what the folder of the model would say, taken from the file's metadata if we wrote
    it, else inferred from names and shapes. prediction_type overrides what the file says. Raises
    InputError.
    """
    layout, parts = recognise(found, source)
    if prediction_type:
        choose('prediction_type', prediction_type, KINDS)
    if MODEL in metadata:
        try:
            model = json.loads(metadata[MODEL])
            model = {key: dict(model[key]) for key in ('configs', 'index', 'scheduler', 'texts')}
        except (ValueError, TypeError, KeyError) as e:
            raise InputError(f'{source}: its metadata {MODEL} is damaged: {e}') from e
        if model['configs'].keys() != parts.keys():
            raise InputError(
                f'{source} has {", ".join(parts)}, but its metadata '
                f'{MODEL} describes {", ".join(model["configs"])}'
            )
    else:
        shapes = infer.Shapes({key: x.shape for key, x in found.items()}, source)
        kind = prediction_type or infer.prediction_type(found, metadata, UNET.prefix)
        described = infer.components(shapes, parts, kind)
        model = {
            'configs': described,
            'index': index(described),
            'scheduler': scheduler(described, kind, 'ztsnr' in found),
            'texts': {},
        }
    if prediction_type:
        model['scheduler']['prediction_type'] = prediction_type
    return layout, parts, model


def index(described):
    """{component: config} -> model_index.json of the diffusers pipeline that they make."""
    unet = described.get('unet', {})
    xl, w = 'addition_embed_type' in unet, 'time_cond_proj_dim' in unet
    kind = 'Inpaint' if unet.get('in_channels') == 9 else ''
    name = 'LatentConsistencyModel' if w and not xl else f'StableDiffusion{"XL" * xl}{kind}'
    out = {'_class_name': f'{name}Pipeline'}
    for part, config in described.items():
        library = 'diffusers' if part in ('unet', 'vae') else 'transformers'
        out[part] = [library, config.get('_class_name') or config['architectures'][0]]
        if library == 'transformers':
            out[part.replace('text_encoder', 'tokenizer')] = [library, 'CLIPTokenizer']
    out['scheduler'] = ['diffusers', 'LCMScheduler' if w else 'DDIMScheduler']
    out |= {'feature_extractor': [None, None], 'image_encoder': [None, None]}
    if xl:
        return out | {'force_zeros_for_empty_prompt': True}
    return out | {'safety_checker': [None, None], 'requires_safety_checker': False}


def scheduler(described, kind, zero_snr):
    """The noise schedule that all of Stable Diffusion shares, as scheduler_config.json.

    With zero terminal SNR the last time alone is pure noise: 'trailing' steps begin there
    (arXiv 2305.08891), 'leading' ones do not.
    """
    return {
        '_class_name': index(described)['scheduler'][1],
        'beta_schedule': 'scaled_linear',
        'beta_start': 0.00085,
        'beta_end': 0.012,
        'num_train_timesteps': 1000,
        'prediction_type': kind,
        'rescale_betas_zero_snr': zero_snr,
        'set_alpha_to_one': False,
        'steps_offset': 1,
        'clip_sample': False,
        'timestep_spacing': 'trailing' if zero_snr else 'leading',
    }


def pad(layout, tokenizer):
    """The padding token of a tokenizer by name."""
    return '!' if layout == SD2 or tokenizer == 'tokenizer_2' else END


def places(described):
    """{component: config} -> those components that the original form has a place for."""
    tiny = [name for name, x in described.items() if x.get('_class_name') == 'AutoencoderTiny']
    return [name for name in described if name in LAYOUTS[SDXL] and name not in tiny]


def layout_for(described):
    """{component: config} -> the layout's name that other programs expect of such a model."""
    if 'text_encoder_2' in described or described.get('unet', {}).get('addition_embed_type'):
        return SDXL
    return SD2 if described.get('text_encoder', {}).get('hidden_act') == 'gelu' else SD1


def open_parts(found, layout, parts, shapes, source):
    """A file's {key: Tensor} -> {component: {diffusers key: Tensor}}.

    shapes: {component: {diffusers key: shape}} of all its components, which must cover the file but
    for NOTHING and what SD 2 leaves unused of its text encoder. Raises InputError. Nothing is read.
    """
    want = {}
    for name, part in parts.items():
        want |= original_shapes(part, shapes[name])

    tower = LAYOUTS[SD2]['text_encoder'].prefix
    layers = sum(key.startswith(tower) and key.endswith('.ln_1.weight') for key in want)
    unused = f'{tower}text_projection', f'{tower}transformer.resblocks.{layers}.'

    def needless(key):
        return key not in want and (
            NOTHING.fullmatch(key) or (layout == SD2 and key.startswith(unused))
        )

    found = weights.cover(want, {k: x for k, x in found.items() if not needless(k)}, source)
    return {name: from_original(part, shapes[name], found) for name, part in parts.items()}


def pack(ckpt, found, texts):
    """A Checkpoint, its components' {diffusers key: Tensor}, texts -> ({key: Tensor}, metadata).

    The file says what `describe` would have to guess. texts: {path: text} of a tokenizer that is
    not CLIP's own. Raises InputError for SDXL's refiner, whose names are others.
    """
    if ckpt.index.get('requires_aesthetics_score'):
        raise InputError(f'{ckpt.folder} is {REFINER} as a single file')
    configs = {name: ckpt.configs[name] for name in found}
    layout = LAYOUTS[layout_for(configs)]
    out = {}
    for name, tensors in found.items():
        out |= to_original(layout[name], tensors)
    kind = ckpt.scheduler.get('prediction_type', 'epsilon')
    if layout is LAYOUTS[SDXL]:  # as programs that read such files expect
        marks = {
            'v_pred': kind == 'v_prediction',
            'ztsnr': ckpt.scheduler.get('rescale_betas_zero_snr'),
        }
        out |= {key: np.zeros(0, np.float32) for key, marked in marks.items() if marked}
    model = {'configs': configs, 'index': ckpt.index, 'scheduler': ckpt.scheduler, 'texts': texts}
    said = {'epsilon': 'epsilon', 'v_prediction': 'v'}.get(kind)
    metadata = {MODEL: json.dumps(model)}
    return out, metadata | ({'modelspec.prediction_type': said} if said else {})
