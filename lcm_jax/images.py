"""Pictures from outside -> arrays, as diffusers' `VaeImageProcessor` prepares them; and back."""

import numpy as np
from PIL import Image, ImageOps

from lcm_jax.errors import InputError


def rgb(image, ground='white'):
    """PIL image -> RGB, on that ground where it is transparent; 16 bits of grey become 8, not clipped.

    Raises InputError for numbers without a range (modes I and F).
    """
    if image.mode in ('I', 'F'):
        raise InputError(
            f'a picture of mode {image.mode}, of no known range; make it L or RGB, 0 to 255'
        )
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if 'A' in image.getbands() or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, ground), image)
    return image.convert('RGB')


def as_list(images, n, what, ground='white'):
    """One PIL image, or a list of `n` -> list of 1 or n, upright and `rgb`; None stays. Errors say `what`."""
    if images is None:
        return None
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for image in images:
        if not isinstance(image, Image.Image):
            raise InputError(f'{what} is a {type(image).__name__}; give a PIL image, or a list')
    if len(images) not in (1, n):
        raise InputError(f'{len(images)} {what}s for {n} prompts; give one for all, or one each')
    return [rgb(ImageOps.exif_transpose(image), ground) for image in images]


def signed(pictures):
    """uint8 [..., 3] -> float32 in -1..1; numpy or jax."""
    return pictures.astype(np.float32) / 127.5 - 1


def picture(image, size):
    """RGB -> [H,W,3] float32 in -1..1, resized to `size` (height, width) by Lanczos."""
    return signed(np.asarray(_resized(image, size)))


def mask(image, size):
    """RGB -> [H,W,1] float32: 1 where it is lighter than mid-grey, to be drawn anew; else 0."""
    grey = np.asarray(_resized(image, size).convert('L'), np.float32) / 255
    return (grey[..., None] >= 0.5).astype(np.float32)


def _resized(image, size):
    height, width = size
    return image.resize((width, height), Image.Resampling.LANCZOS)


def masked(picture, mask):
    """The picture with grey (0) where the mask is 1."""
    return picture * (mask < 0.5)


def shrink(mask, factor):
    """[...,H,W,1] -> [...,H/factor,W/factor,1]: every factor-th pixel (torch's `nearest`)."""
    return mask[..., ::factor, ::factor, :]


def pictures(arrays):
    """[N,H,W,3] uint8 -> list of PIL images."""
    return [Image.fromarray(a) for a in np.asarray(arrays)]
