"""What a user asks of a pipeline, checked and completed: sampler, guidance, strength, pictures."""

import operator
import warnings

import numpy as np

from lcm_jax import images
from lcm_jax.errors import InputError, choose
from lcm_jax.families import takes_mask
from lcm_jax.samplers import SAMPLERS


def whole(name, value, least=0, most=2**32 - 1):
    """An argument -> int; InputError unless it is one in that range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise InputError(f'{name} = {value!r}; a whole number from {least} to {most}')
    return number


def sides(name, value):
    """A pair of whole numbers, heights first -> (int, int); None stays. InputError for anything else."""
    if value is None:
        return None
    if np.shape(value) != (2,):
        raise InputError(f'{name} = {value!r}; two numbers, heights first')
    return tuple(whole(f'a number of {name}', x) for x in value)


def manner(sampler, guidance, negative, *, fast, embedded, default, told=None):
    """-> sampler, guidance, whether a null condition takes part; with their defaults.

    fast: an acceleration LoRA takes part, or the model is one for few steps; embedded: the UNet takes
    guidance as an input, and in training was `told` this much (from, to), if that is known; default: the
    model's guidance. Warns of settings that spoil pictures or have no effect.
    """
    sampler = sampler or ('lcm' if fast or embedded else 'ddim')
    distilled = choose('sampler', sampler, SAMPLERS).distilled
    inside = (fast or distilled) and not embedded  # guidance is in the weights already
    if guidance is None:
        guidance = 1 if inside else default
    if not 0 <= guidance < float('inf'):
        raise InputError(f'guidance = {guidance}; a number of 0 or more (up to 1: none)')
    if inside and guidance > 2:
        what = 'a few-step LoRA or model' if fast else 'the LCM sampler'
        warnings.warn(f'guidance {guidance:g} with {what} burns pictures; use 1 to 2', stacklevel=4)
    if embedded and told and not told[0] <= guidance <= told[1]:
        what = f'this model has learnt {told[0]:g} to {told[1]:g}'
        warnings.warn(f'guidance {guidance:g}, but {what}', stacklevel=4)
    guided = guidance > 1 and not embedded
    if negative and not guided:
        why = (
            'with this model, which takes guidance as an input'
            if embedded
            else f'at guidance {guidance:g}; it acts above 1'
        )
        warnings.warn(f'the negative prompt has no effect {why}', stacklevel=4)
    return sampler, float(guidance), guided


def start(image, mask, strength, needs_mask):
    """-> strength with its default, and whether to start from noise alone.

    Raises InputError if something acts on what is not given, or strength is out of range.
    """
    if needs_mask and mask is None:
        raise InputError('this UNet is made for inpainting: give an image and a mask')
    if mask is not None and image is None:
        raise InputError('a mask without an image; give both to inpaint')
    if strength is not None and image is None:
        raise InputError(f'strength = {strength} without an image')
    if strength is None:
        strength = 0.8 if image is not None and mask is None else 1.0
    if not 0 < strength <= 1:
        raise InputError(f'strength = {strength}; a number above 0, at most 1')
    return strength, mask is not None and strength == 1


def picture_size(image, factor):
    """The first image's (height, width) px, rounded down to multiples of `factor`."""
    width, height = image[0].size
    return height - height % factor, width - width % factor


def pictures(image, mask, size, unet, vae, pure):
    """Lists as of `images.as_list`, or None -> what `draw.draw` takes as pictures of `size`, in numpy."""
    if image is None:
        return {}
    picture = np.stack([images.picture(x, size) for x in image])
    if mask is None:
        return {'image': picture}
    mask = np.stack([images.mask(x, size) for x in mask])
    out = {'mask': images.shrink(mask, vae.factor)}
    if takes_mask(unet, vae):
        out['masked'] = images.masked(picture, mask)
    if not (takes_mask(unet, vae) and pure):
        out['image'] = picture
    return out
