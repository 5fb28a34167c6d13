"""Sets of pictures -> their statistics, and the distance of two."""

import contextlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lcm_jax import metrics
from lcm_jax.data.files import cache_folder, keep
from lcm_jax.data.pairs import batches, content, pairs
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError
from lcm_jax.features import open_features
from lcm_jax.metrics import Statistics
from lcm_jax.sharding import local_mesh

BATCH = 64  # pictures at a time


def statistics_of(features, source, settings, ids):
    """The samples of a source with numbers `ids` -> Statistics, from the cache if they were measured before.

    The cache, lcm_jax/statistics beside the indexes of tars, goes by the pictures' bytes, how they are cut
    and the features' identity; what is damaged or was written in another form is measured again.
    """
    key = f'{content(source, settings, ids)}-{settings.resolution}-{features.identity}'
    file = cache_folder().with_name('statistics') / f'{key}.npz'
    seen = metrics.looked_at(features.identity, settings.resolution, settings.resolution)
    with contextlib.suppress(InputError):
        found = Statistics.load(file)
        if found.features == seen:
            return found
    found = streamed(features, pairs(source, settings, ids), len(ids), source.name)
    keep(file, found.arrays())
    return found


def streamed(features, samples, total, label):
    """Iterator of (number, picture, caption) -> Statistics, BATCH pictures at a time in memory."""
    found = None
    with tqdm(total=total, desc=f'features of {label}', leave=False) as bar:
        for numbers, pictures in batches(samples, BATCH):
            seen = metrics.looked_at(features.identity, *pictures.shape[1:3])
            part = Statistics.of(seen, features.images(pictures), numbers)
            found = found.merge(part) if found else part
            bar.update(len(numbers))
    return found


def side(features, name, resolution):
    """A .npz file of statistics, or the name of a source -> function () -> Statistics.

    Raises InputError for what cannot be opened, and if the source's pictures have several sizes and no
    resolution is given.
    """
    if name.endswith('.npz'):
        found = Statistics.load(Path(name))
        if not found.features.startswith(f'{features.identity},'):
            raise InputError(
                f'{name} holds statistics of features {found.features!r}; this network is '
                f'{features.identity!r}: measure the pictures again with it'
            )
        return lambda: found
    source = open_source(
        name, DataSettings(source=name, resolution=resolution or 64, crop='center')
    )
    if not resolution:
        shapes, first = np.unique(source.sizes, axis=0, return_index=True)
        if len(shapes) > 1 or shapes[0][0] != shapes[0][1]:
            said = ', '.join(
                f'{source.sample_name(i)} {h} x {w}'
                for i, (h, w) in zip(first[:3], shapes[:3].tolist(), strict=False)
            )
            raise InputError(
                f'{name}: pictures of {len(shapes)} sizes, or not square: {said}; give a '
                'resolution that all are resized and cut to'
            )
        resolution = int(shapes[0][0])
    settings = DataSettings(source=name, resolution=resolution, crop='center')
    return lambda: statistics_of(features, source, settings, np.arange(len(source)))


def compare(real, fake, features='emoji', resolution=0):
    """Two sets, each the name of a source or a .npz file of statistics -> dict of numbers.

    features: as `features.open_features` takes it. resolution: px of the square that all pictures are
    resized and cut to; 0: they have one size already. -> 'fid', 'kid', 'kid_std', 'real' and 'fake'
    (numbers of pictures), 'features', 'biased', and the Statistics of both.
    """
    features = open_features(features, mesh=local_mesh())
    sides = [side(features, name, resolution) for name in (real, fake)]  # all that may be refused
    real, fake = (measured() for measured in sides)
    return {
        **metrics.compare(real, fake),
        'real': real.n,
        'fake': fake.n,
        'features': real.features,
        'statistics': (real, fake),
    }
