"""Names of the original checkpoints, against diffusers' converter of single files."""

import dataclasses

import pytest
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from lcm_jax import weights
from lcm_jax.models import configs
from lcm_jax.models.shapes import unet_shapes
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
