"""A picture of any size -> the pixels and the sizes that a network is trained on."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from lcm_jax.conditioning import micro_conditioning
from lcm_jax.data.order import DRAW
from lcm_jax.data.samples import Broken

THIN = 16  # times the cut's area that a resized picture may have


class Draw(NamedTuple):
    """What chance decides about one sample."""

    top: float  # 0..1: how far down the crop lies within what is left over
    left: float
    flip: bool
    caption: float  # 0..1: which of several captions


def draw(seed, step, row, settings):
    """The Draw of one row of one step: a pure function of seed, step and row."""
    top, left, flip, caption = np.random.default_rng((DRAW, seed, step, row)).random(4)
    if settings.crop == 'center':
        top = left = 0.5
    return Draw(top, left, settings.flip and flip < 0.5, caption)


def prepare(picture, original, target, drawn):
    """PIL image RGB -> pixels [h,w,3] uint8, sizes [6] float32 (see `micro_conditioning`).

    original: (height, width) of the source picture; target: (h, w). The picture is resized by
    Lanczos (antialiased) until it just covers the target, cut, and flipped. The crop's corner is
    told as seen in the resized picture, after the flip. Raises Broken for a picture so thin that the
    cut would be less than 1 / THIN of it.
    """
    (h, w), (height, width) = target, picture.size[::-1]
    scale = max(h / height, w / width)
    tall, wide = max(h, round(height * scale)), max(w, round(width * scale))
    if tall * wide > THIN * h * w:
        raise Broken('too elongated', f'{height} x {width}, to be cut to {h} x {w}')
    if (tall, wide) != (height, width):
        picture = picture.resize((wide, tall), Image.Resampling.LANCZOS)
    top, left = corner(tall - h, drawn.top), corner(wide - w, drawn.left)
    pixels = np.asarray(picture.crop((left, top, left + w, top + h)))
    if drawn.flip:
        pixels, left = pixels[:, ::-1], wide - w - left
    return pixels, micro_conditioning(original, (top, left), target)


def corner(room, share):
    """A share 0..1 of the room left over -> one of 0..room, each as likely; 0.5 is the middle."""
    return min(int(share * (room + 1)), room)


def shapes(resolution):
    """Bucket shapes (height, width), of about resolution^2 px, up to 1:4 and 4:1.

    As SDXL's (arXiv 2307.01952, appendix I): the long side in steps of 64 px, the short one the most
    that keeps within the area; below 256 px steps of 16.
    """
    unit = 64 if resolution >= 256 else 16
    near = max(unit, resolution // unit * unit)
    long = range(near, 2 * near + 1, unit)
    pairs = [(max(unit, resolution**2 // side // unit * unit), side) for side in long]
    return sorted({*pairs, *(pair[::-1] for pair in pairs)})


def nearest(sizes, shapes):
    """sizes [N,2] -> [N], the number of the shape whose aspect ratio is nearest (in logarithm)."""
    aspect = np.log(np.maximum(sizes[:, 0], 1) / np.maximum(sizes[:, 1], 1))
    table = np.log([h / w for h, w in shapes])
    return np.abs(aspect[:, None] - table).argmin(1)
