"""Names of the original checkpoints, against diffusers' converter of single files."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from lcm_jax import infer, single, weights
from lcm_jax.models import configs, shapes
from lcm_jax.models.shapes import unet_shapes
from lcm_jax.models.vae import VAESpec
from lcm_jax.models.zoo import MODELS
from lcm_jax.original import unet_modules

# A fine-tune of other sizes: four resnets a level, transformers in the first and last level only.
ODD = dataclasses.replace(
    MODELS['sdxl'].unet,
    widths=(32, 64),
    heads=(2, 4),
    down=((1, 1, 1, 1), (0, 0, 0, 0)),
    up=((0,) * 5, (1,) * 5),
)
SPECS = {**{name: model.unet for name, model in MODELS.items()}, 'odd': ODD}


@pytest.mark.parametrize('model', SPECS)
def test_unet_names_are_those_that_diffusers_undoes(model):
    names = weights.keys(unet_shapes(SPECS[model]))
    original = unet_modules(names)
    assert len(set(original.values())) == len(names)
    file = {f'model.diffusion_model.{new}': old for old, new in original.items()}
    back = convert_ldm_unet_checkpoint(file, configs.unet_config(SPECS[model], 64))
    assert back == {name: name for name in names}


def test_unet_modules_without_leaves_and_the_guidance_embedding():
    names = weights.keys(unet_shapes(dataclasses.replace(ODD, w_dim=16)))
    got = unet_modules({name.rsplit('.', 1)[0] for name in names})
    assert got['time_embedding.cond_proj'] == 'time_embed.cond_proj'
    assert got['down_blocks.0.downsamplers.0.conv'] == 'input_blocks.5.0.op'
    assert got['up_blocks.0.upsamplers.0.conv'] == 'output_blocks.4.1.conv'


def test_a_name_of_another_model():
    with pytest.raises(KeyError, match='double_blocks'):
        unet_modules(['conv_in', 'double_blocks.0.img_attn'])


@pytest.mark.parametrize('spec', [VAESpec(), tiny.VAE, VAESpec(widths=(32,), resnets=3)])
def test_vae_names_are_those_that_diffusers_undoes(spec):
    want = weights.keys(shapes.vae_shapes(spec))
    original = single.original_shapes(single.VAE, want)
    file = {key: torch.empty(shape, device='meta') for key, shape in original.items()}
    back = convert_ldm_vae_checkpoint(file, configs.vae_config(spec, 512))
    assert {key: tuple(x.shape) for key, x in back.items()} == want


@pytest.mark.parametrize('spec', [MODELS['sdxl'].text[1], MODELS['sd21'].text[0]])
def test_open_clip_names_are_those_that_diffusers_undoes(spec):
    want = weights.keys(shapes.text_shapes(spec))
    part = single.LAYOUTS[single.SDXL]['text_encoder_2']
    file = {
        key: torch.empty(shape, device='meta')
        for key, shape in single.original_shapes(part, want).items()
    }
    with torch.device('meta'):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs.text_config(spec)))
    back = convert_open_clip_checkpoint(model, file, part.prefix)
    assert {key: tuple(x.shape) for key, x in back.items()} == want


@pytest.mark.parametrize('order', [sorted, lambda names: sorted(names)[::-1]])
def test_open_clip_values_are_those_that_diffusers_undoes(order):
    """q, k and v are rows of one tensor: each must come back as itself, whatever order names come in."""
    spec = dataclasses.replace(
        MODELS['sdxl'].text[1], width=8, layers=2, heads=2, mlp=12, projection=8
    )
    rng, names = np.random.default_rng(), weights.keys(shapes.text_shapes(spec))
    want = {key: rng.normal(size=names[key]).astype(np.float32) for key in order(names)}
    part = single.LAYOUTS[single.SDXL]['text_encoder_2']
    found = {key: single.Tensor(key, x.shape, x.dtype, lambda x=x: x) for key, x in want.items()}
    file = {key: np.array(x) for key, x in single.to_original(part, found).items()}
    config = transformers.CLIPTextConfig(**configs.text_config(spec))
    with torch.device('meta'):
        model = transformers.CLIPTextModel(config)
    torches = {key: torch.from_numpy(x) for key, x in file.items()}
    theirs = convert_open_clip_checkpoint(model, torches, part.prefix)
    assert theirs.keys() == want.keys()
    originals = {
        key: single.Tensor(key, x.shape, x.dtype, lambda x=x: x) for key, x in file.items()
    }
    ours = single.from_original(part, {key: x.shape for key, x in want.items()}, originals)
    for key, x in want.items():
        np.testing.assert_array_equal(theirs[key].numpy(), x, key)
        np.testing.assert_array_equal(np.array(ours[key]), x, key)


# Of the published files, less what single.NOTHING and SD 2's unused layer leave out: the number of
# tensors, and some of the names that tell the families apart.
PUBLISHED = {
    'sd15': (
        686 + 248 + 196,
        'cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight',
        'model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.bias',
    ),
    'sd21': (
        686 + 248 + 23 * 12 + 4,
        'cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight',
        'model.diffusion_model.output_blocks.8.2.conv.weight',
    ),
    'sdxl': (
        1680 + 248 + 196 + 32 * 12 + 5,
        'conditioner.embedders.1.model.text_projection',
        'model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.2.bias',
    ),
    'ssd1b': (
        944 + 248 + 196 + 32 * 12 + 5,
        'conditioner.embedders.0.transformer.text_model.final_layer_norm.bias',
        'model.diffusion_model.output_blocks.2.1.transformer_blocks.9.attn1.to_q.weight',
    ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_full_size_files_are_recognised_and_covered(name):
    """Every original key stands for diffusers keys, one to one, and its shapes tell the specs."""
    model, (count, *examples) = MODELS[name], PUBLISHED[name]
    want = {
        'unet': weights.keys(unet_shapes(model.unet)),
        'vae': weights.keys(shapes.vae_shapes(model.vae)),
    }
    for part, text in zip(('text_encoder', 'text_encoder_2'), model.text, strict=False):
        want[part] = weights.keys(shapes.text_shapes(text))
    kind = {'sd15': single.SD1, 'sd21': single.SD2}.get(name, single.SDXL)
    file = {}
    for part, keys in want.items():
        file |= single.original_shapes(single.LAYOUTS[kind][part], keys)
    assert len(file) == count and all(key in file for key in examples)
    layout, parts = single.recognise(file, name)
    assert (layout, parts.keys()) == (kind, want.keys())
    found = infer.components(infer.Shapes(file, name), parts)
    assert configs.unet_spec(found['unet']) == model.unet
    assert configs.vae_spec(found['vae']) == model.vae
    for part, text in zip(('text_encoder', 'text_encoder_2'), model.text, strict=False):
        assert configs.text_spec(found[part]) == text
    dummies = {key: single.Tensor(key, shape, None, None) for key, shape in file.items()}
    opened = single.open_parts(dummies, layout, parts, want, name)
    assert {p: {k: x.shape for k, x in xs.items()} for p, xs in opened.items()} == want


def test_keys_that_hold_nothing():
    """What the published files hold beside weights; and names near them that must not be lost."""
    schedule = (
        'betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod lvlb_weights '
        'sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod '
        'sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped '
        'posterior_mean_coef1 posterior_mean_coef2 logvar scale_factor denoiser.sigmas'
    )
    others = (
        'model_ema.decay model_ema.diffusion_modelinput_blocks00weight v_pred ztsnr '
        'first_stage_model.loss.discriminator.main.0.weight cond_stage_model.model.logit_scale '
        'cond_stage_model.transformer.text_model.embeddings.position_ids '
        'conditioner.embedders.0.transformer.text_projection.weight cond_stage_model.text_projection'
    )
    assert all(single.NOTHING.fullmatch(key) for key in f'{schedule} {others}'.split())
    for key in ('edm_mean', 'cond_stage_model.model.text_projection', 'model.betas_x', 'beta'):
        assert not single.NOTHING.fullmatch(key)
    for model in PUBLISHED.values():
        assert not any(single.NOTHING.fullmatch(key) for key in model[1:])
