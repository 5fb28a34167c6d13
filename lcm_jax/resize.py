"""How pictures come to the networks of metrics: resized and scaled as each network's reference does."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lcm_jax.errors import InputError
from lcm_jax.images import signed
from lcm_jax.models.configs import Config
from lcm_jax.models.inception import SIZE
from lcm_jax.tensors import read_json


class Pixels(NamedTuple):
    """uint8 [B,H,W,3] -> host, in numpy -> device, jitted -> float32 [B,h,w,3] that the network takes."""

    name: str
    host: Callable
    device: Callable


def as_they_are(pictures):
    """Nothing to be done on the host."""
    return pictures


def _each(fn, pictures):
    """fn over pictures side by side: PIL lets go of the interpreter while it resizes."""
    with ThreadPoolExecutor() as pool:
        return np.stack([*pool.map(fn, pictures)])


def bilinear(x, size, centred):
    """x [B,H,W,C] -> [B,size,size,C], without antialiasing.

    centred: between the centres of pixels, as torch's `interpolate(align_corners=False)`; else
    between their upper left corners, as TensorFlow 1's `resize_bilinear`.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        step = np.float32(n / size)
        at = np.arange(size, dtype=np.float32)
        at = (
            np.maximum((at + np.float32(0.5)) * step - np.float32(0.5), 0) if centred else at * step
        )
        low = at.astype(int)
        a, b = x.take(low, axis), x.take(np.minimum(low + 1, n - 1), axis)
        x = a + (b - a) * np.expand_dims(at - low, [i for i in range(4) if i != axis])
    return x


def bicubic(pictures, size):
    """uint8 [B,H,W,3] -> float32 [B,size,size,3] in 0..255: PIL's antialiased bicubic, unrounded."""

    def channel(x):
        image = Image.fromarray(x.astype(np.float32))
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)

    return _each(lambda p: np.stack([channel(p[..., c]) for c in range(3)], -1), pictures)


# What FIDs are computed with. Each mode gives other numbers; compare within one only.
INCEPTION = {
    mode.name: mode
    for mode in (
        # torch's bilinear on 0..1 (pytorch-fid; clean-fid's `legacy_pytorch`).
        Pixels(
            'pytorch-fid',
            as_they_are,
            jax.jit(lambda x: 2 * bilinear(x.astype(jnp.float32) / 255, SIZE, True) - 1),
        ),
        # TensorFlow 1's bilinear on 0..255 (the paper's own program; torch-fidelity).
        Pixels(
            'torch-fidelity',
            as_they_are,
            jax.jit(lambda x: (bilinear(x.astype(jnp.float32), SIZE, False) - 128) / 128),
        ),
        # arXiv 2104.11222.
        Pixels('clean-fid', partial(bicubic, size=SIZE), jax.jit(lambda x: (x - 128) / 128)),
    )
}

PLAIN = Pixels('unresized', as_they_are, jax.jit(signed))  # LPIPS


def emoji_pixels(size):
    """The shipped image tower's: an antialiased bicubic on -1..1, where the size is another."""

    def device(x):
        x = signed(x)
        shape = len(x), size, size, 3
        return x if x.shape == shape else jax.image.resize(x, shape, 'bicubic')

    return Pixels(f'bicubic{size}', as_they_are, jax.jit(device))


# Keys of preprocessor_config.json with the only values that are computed here.
CLIP_ONLY = {
    'do_center_crop': (True,),
    'do_normalize': (True,),
    'do_rescale': (True,),
    'do_resize': (True,),
    'resample': (int(Image.Resampling.BICUBIC),),
    'rescale_factor': (1 / 255,),
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(folder, size):
    """How a CLIP folder's processor prepares pictures for a tower of `size` px -> Pixels, (mean, std).

    PIL's bicubic brings the shorter side to `shortest_edge`, rounded to uint8, then the centre is cut
    out (transformers' CLIPImageProcessor, in PIL). Raises InputError for other ways.
    """
    file, config = _processor(folder)
    edge = _side(config, 'size', 'shortest_edge')
    crop = _side(config, 'crop_size', 'height', 'width')
    if not edge >= crop == size:
        raise InputError(
            f'{file}: size {edge}, crop_size {crop}; the image tower takes a crop_size of {size}, '
            'cut out of a size that is no smaller'
        )
    mean, std = (
        _colour(config, key, default)
        for key, default in (('image_mean', CLIP_MEAN), ('image_std', CLIP_STD))
    )

    def one(picture):
        height, width = picture.shape[:2]
        short = min(height, width)
        height, width = int(edge * height / short), int(edge * width / short)
        image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - crop) // 2, (width - crop) // 2
        return np.asarray(image)[top : top + crop, left : left + crop]

    device = jax.jit(lambda x: (x.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std))
    return Pixels(f'bicubic{edge}-crop{crop}', partial(_each, one), device), (mean, std)


def _processor(folder):
    """-> the file that says it, its Config."""
    file, newer = (Path(folder, f'{name}_config.json') for name in ('preprocessor', 'processor'))
    if file.is_file() or not newer.is_file():
        return file, Config(read_json(file), CLIP_ONLY, file)
    config = Config(read_json(newer), {}, newer)
    return newer, Config(config['image_processor'], CLIP_ONLY, newer)


def _side(config, key, *sides):
    """`config[key]`, a number of px or one for each of `sides` -> that number; default CLIP's 224."""
    value = config.get(key, 224)
    numbers = [value]
    if isinstance(value, dict) and {*value} == {*sides}:
        numbers = [*value.values()]
    if numbers.count(numbers[0]) < len(numbers) or type(numbers[0]) is not int or numbers[0] < 1:
        raise InputError(
            f'{config.source}: {key} = {value!r} is not supported; accepted: a number of px, or the '
            f'same as {" and ".join(sides)}'
        )
    return numbers[0]


def _colour(config, key, default):
    value = config.get(key, default)
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise InputError(f'{config.source}: {key} = {value!r}; accepted: three numbers')
    return tuple(map(float, value))
