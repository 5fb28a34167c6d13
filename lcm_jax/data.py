"""Sources of captioned pictures."""

import io
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcm_jax.errors import InputError, choose

EMOJI = Path(__file__).parent / 'emoji'
STYLES = ('noto', 'twemoji', 'fluent')
PICTURE_TYPES = ('webp', 'png', 'jpg', 'jpeg')


class Sample(NamedTuple):
    """One captioned picture."""

    key: str
    picture: np.ndarray  # [H,W,3] uint8
    caption: str


def webdataset(file):
    """A webdataset / img2dataset tar -> its Samples, in order.

    Members that follow each other with one key (the name up to its first dot) make a sample; an
    extension that the sample has already starts a new one. Raises InputError naming the file, and
    the sample that lacks something or cannot be read.
    """
    try:
        with tarfile.open(file) as tar:
            for key, parts in _grouped(tar):
                yield _sample(key, parts, file)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as e:
        raise InputError(f'cannot read {file} as a tar: {e}') from e


def _grouped(tar):
    """Open tar -> (key, {extension: bytes}) of each sample."""
    key, parts = None, {}
    for member in tar:
        if member.isfile():
            folder, slash, name = member.name.rpartition('/')
            stem, _, extension = name.partition('.')
            extension = extension.lower()
            if parts and (folder + slash + stem != key or extension in parts):
                yield key, parts
                parts = {}
            key = folder + slash + stem
            parts[extension] = tar.extractfile(member).read()
    if parts:
        yield key, parts


def _sample(key, parts, file):
    picture = next((parts[e] for e in PICTURE_TYPES if e in parts), None)
    if picture is None or 'txt' not in parts:
        raise InputError(
            f'{file}: sample {key!r} has {", ".join(sorted(parts))}; it needs txt and '
            f'one of {", ".join(PICTURE_TYPES)}'
        )
    try:
        picture = np.asarray(Image.open(io.BytesIO(picture)).convert('RGB'))
        caption = parts['txt'].decode().strip()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f'{file}: sample {key!r} cannot be read: {e}') from e
    return Sample(key, picture, caption)


def emoji(split, styles=STYLES):
    """The shipped emoji set: split 'train' or 'heldout' -> [Sample], one style after the other."""
    for style in styles:
        choose('style', style, dict.fromkeys(STYLES))
    return [s for style in styles for s in webdataset(EMOJI / 'data' / f'{style}-{split}.tar.gz')]


def to_float(pictures):
    """uint8 [..., 3] -> float32 in -1..1."""
    return np.asarray(pictures, np.float32) / 127.5 - 1


def shuffled(n, batch, seed):
    """-> indices(i): the `batch` sample numbers of step i, each epoch in a fresh random order."""
    per_epoch = n // batch
    if not per_epoch:
        raise InputError(f'batch of {batch} from {n} samples: the batch must not exceed the set')

    def indices(i):
        epoch, at = divmod(i, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(n)
        return order[at * batch : (at + 1) * batch]

    return indices
