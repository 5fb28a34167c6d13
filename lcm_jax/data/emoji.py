"""The shipped emoji set, whole and decoded: small enough to be held in memory."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcm_jax.data import tars
from lcm_jax.data.samples import decode
from lcm_jax.errors import choose

EMOJI = Path(__file__).parents[1] / 'emoji'
STYLES = ('noto', 'twemoji', 'fluent')
SPLITS = ('train', 'heldout')


class Sample(NamedTuple):
    """One captioned picture."""

    key: str
    picture: np.ndarray  # [H,W,3] uint8
    caption: str


def archives(split, styles=STYLES):
    """-> paths of the set's tars. Raises InputError for an unknown split or style."""
    choose('split', split, dict.fromkeys(SPLITS))
    for style in styles:
        choose('style', style, dict.fromkeys(STYLES))
    return [str(EMOJI / 'data' / f'{style}-{split}.tar.gz') for style in styles]


def emoji(split, styles=STYLES):
    """Split 'train' or 'heldout' -> [Sample], one style after the other."""
    return [sample for file in archives(split, styles) for sample in read(file)]


def read(file):
    """A tar of the set -> its Samples, one after the other."""
    index = tars.index(file, 'txt')
    for key, place in zip(index.names, index.places, strict=True):
        raw = tars.fetch(file, place, 'txt')
        yield Sample(key, np.asarray(decode(raw.picture)), raw.captions[0])
