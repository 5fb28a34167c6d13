"""Sources of captioned pictures."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from lcm_jax.errors import InputError

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

    Members KEY.ext that follow each other with one KEY (up to the first dot) make a sample.
    Raises InputError naming the file and the member that cannot be read.
    """
    def sample(key, parts):
        picture = next((parts[e] for e in PICTURE_TYPES if e in parts), None)
        if picture is None or 'txt' not in parts:
            raise InputError(f'{file}: sample {key!r} has {sorted(parts)}; it needs a txt and '
                             f'one of {PICTURE_TYPES}')
        try:
            picture = np.asarray(Image.open(io.BytesIO(picture)).convert('RGB'))
        except (UnidentifiedImageError, OSError) as e:
            raise InputError(f'{file}: the picture of sample {key!r} cannot be read: {e}') from e
        return Sample(key, picture, parts['txt'].decode().strip())

    try:
        with tarfile.open(file) as tar:
            key, parts = None, {}
            for member in tar:
                if not member.isfile():
                    continue
                stem, _, ext = Path(member.name).name.partition('.')
                if stem != key and parts:
                    yield sample(key, parts)
                    parts = {}
                key = stem
                parts[ext.lower()] = tar.extractfile(member).read()
            if parts:
                yield sample(key, parts)
    except (OSError, tarfile.TarError) as e:
        raise InputError(f'cannot read {file} as a tar: {e}') from e


def emoji(split, styles=STYLES):
    """The shipped emoji set: split 'train' or 'heldout' -> [Sample], one style after the other."""
    return [s for style in styles for s in webdataset(EMOJI / 'data' / f'{style}-{split}.tar')]


def to_float(pictures):
    """uint8 [..., 3] -> float32 in -1..1."""
    return np.asarray(pictures, np.float32) / 127.5 - 1


def shuffled(n, batch, seed):
    """-> indices(i): the `batch` sample numbers of step i, epoch after epoch in fresh random order."""
    per_epoch = n // batch
    if not per_epoch:
        raise InputError(f'batch of {batch} from {n} samples: the batch must not exceed the set')

    def indices(i):
        epoch, at = divmod(i, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(n)
        return order[at * batch:(at + 1) * batch]

    return indices
