"""Small pipelines of every family with random weights, written by diffusers: 16 px pictures."""

import dataclasses

import diffusers
from conftest import randomise
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from lcm_jax.data.emoji import EMOJI
from lcm_jax.models.configs import unet_config
from lcm_jax.models.unet import UNetSpec

SD = UNetSpec(
    widths=(8, 16),
    down=((1,), (0,)),
    mid=1,
    up=((0, 0), (1, 1)),
    heads=(2, 4),
    context_dim=16,
    groups=4,
)
SDXL = dataclasses.replace(
    SD,
    down=((0,), (1,)),
    up=((1, 1), (0, 0)),
    context_dim=32,
    linear_proj=True,
    size_dim=8,
    pooled_dim=12,
)
UNETS = {
    'sd': SD,
    'sd2': dataclasses.replace(SD, linear_proj=True),
    'inpaint': dataclasses.replace(SD, in_channels=9),
    'lcm': dataclasses.replace(SD, w_dim=8),
    'sdxl': SDXL,
    'ssd1b': dataclasses.replace(SDXL, mid=None, up=((1, 2), (0, 0))),
}
NOISE = {
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'clip_sample': False,
    'set_alpha_to_one': False,
    'steps_offset': 1,
}
SCHEDULERS = {  # model -> its scheduler_config.json, of several classes
    'sd': diffusers.DDIMScheduler(**NOISE),
    'sd2': diffusers.DDIMScheduler(**NOISE, prediction_type='v_prediction'),
    'inpaint': diffusers.PNDMScheduler(
        **{k: v for k, v in NOISE.items() if k != 'clip_sample'}, skip_prk_steps=True
    ),
    'lcm': diffusers.LCMScheduler(**NOISE),
    'sdxl': diffusers.EulerDiscreteScheduler.from_config(NOISE, timestep_spacing='leading'),
    'ssd1b': diffusers.EulerDiscreteScheduler.from_config(NOISE, timestep_spacing='leading'),
}


def tokenizer():
    return CLIPTokenizer.from_pretrained(str(EMOJI / 'pipeline' / 'tokenizer'))


def text_encoder(kind, seed, **changes):
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        projection_dim=12,
        **changes,
    )
    return randomise(kind(config), seed)


def autoencoder(seed=0):
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
            down_block_types=('DownEncoderBlock2D',) * 2,
            up_block_types=('UpDecoderBlock2D',) * 2,
        ),
        seed,
    )


def build(model, **scheduler):
    """A key of UNETS -> diffusers' text-to-image or inpainting pipeline of such a model."""
    unet = diffusers.UNet2DConditionModel.from_config(unet_config(UNETS[model], 8))
    parts = {
        'vae': autoencoder(),
        'unet': randomise(unet, 2),
        'scheduler': SCHEDULERS[model].from_config(SCHEDULERS[model].config, **scheduler),
        'tokenizer': tokenizer(),
        'text_encoder': text_encoder(CLIPTextModel, 1),
    }
    if model in ('sdxl', 'ssd1b'):
        return diffusers.StableDiffusionXLPipeline(
            **parts,
            tokenizer_2=tokenizer(),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, 3, hidden_act='gelu'),
            add_watermarker=False,
        )
    kind = {
        'lcm': diffusers.LatentConsistencyModelPipeline,
        'inpaint': diffusers.StableDiffusionInpaintPipeline,
    }.get(model, diffusers.StableDiffusionPipeline)
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
