"""The pipeline classes of diffusers that are drawn here: rows of data."""

from typing import NamedTuple

from lcm_jax.conditioning import TEXT_ENCODERS
from lcm_jax.distill import w_range
from lcm_jax.errors import InputError
from lcm_jax.models.configs import Config


class Family(NamedTuple):
    """What a class of model_index.json says beyond its components' own configs."""

    text_encoders: tuple[str, ...]
    guidance: float  # default without an acceleration LoRA, diffusers'
    zero_null: bool = False  # without a negative prompt: zeros, or the empty prompt's embedding
    embedded: float = 8.5  # default of a UNet that takes guidance: diffusers' LCM pipelines'
    told: tuple[float, float] | None = None  # what training told such a UNet, if that is known


SD = Family(TEXT_ENCODERS[:1], 7.5)
SDXL = Family(TEXT_ENCODERS, 5.0, True)
FAMILIES = {
    'StableDiffusionPipeline': SD,
    'StableDiffusionImg2ImgPipeline': SD,
    'StableDiffusionInpaintPipeline': SD,
    'StableDiffusionXLPipeline': SDXL,
    'StableDiffusionXLImg2ImgPipeline': SDXL,
    'StableDiffusionXLInpaintPipeline': SDXL,
    'LatentConsistencyModelPipeline': SD,
    'LatentConsistencyModelImg2ImgPipeline': SD,
}
# Keys of model_index.json with the only values that are drawn as the model means them. Components
# that a family does not name (safety checker, image encoder, ...) are left aside.
ONLY = {'_class_name': tuple(FAMILIES), 'requires_aesthetics_score': (False,)}


def read_family(index, source='model_index.json'):
    """model_index.json as a dict -> Family. Raises InputError for what is not supported.

    Where it says from which w to which the model was trained (a full LCM that was distilled here),
    `embedded` is in the middle of them.
    """
    if not index:
        raise InputError(f'no such file: {source}')
    index = Config(index, ONLY, source)
    family = FAMILIES[index['_class_name']]
    zero = index.get('force_zeros_for_empty_prompt', family.zero_null)
    family = family._replace(zero_null=bool(zero) and len(family.text_encoders) > 1)
    ours = index.get('_lcm_jax')
    if not isinstance(ours, dict) or 'w' not in ours:
        return family
    low, high = w_range(str(ours['w']))
    return family._replace(embedded=1 + (low + high) / 2, told=(1 + low, 1 + high))


def check_channels(unet, vae, source):
    """InputError unless the UNet reads and writes the VAE's latents, alone or beside a mask."""
    c = vae.latent_channels
    if unet.out_channels != c or unet.in_channels not in (c, 2 * c + 1):
        raise InputError(
            f'{source}: the UNet has {unet.in_channels} channels in and {unet.out_channels} out; '
            f'with this VAE {c} or {2 * c + 1} (inpainting) in and {c} out are supported'
        )


def takes_mask(unet, vae):
    """Whether the UNet has channels for a mask and the masked picture's latents."""
    return unet.in_channels > vae.latent_channels
