"""Names of sources -> sources: an index of samples, and a way to read each."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lcm_jax.data import emoji, folders, records, tars
from lcm_jax.data.cache import open_cache
from lcm_jax.data.files import expand, gather
from lcm_jax.data.samples import SCORES, Drops, Index, Raw
from lcm_jax.errors import InputError, choose


@dataclasses.dataclass(frozen=True)
class Source:
    """Captioned pictures, or what a model made of them (`encoded`), by number 0..N-1."""

    name: str
    index: Index
    ids: np.ndarray  # [N], rows of the index that the filters leave
    fetch: Callable  # fetch(place) -> Raw, or {name: array} if encoded. Raises Broken
    broken: Drops  # samples of the index that cannot be used
    filtered: Drops  # those that the filters left out
    passed: Drops  # files that are passed over
    cut: list  # [(file, why)] of files that could not be read to their end
    encoded: dict | None = None  # header of a cache

    def __len__(self):
        return len(self.ids)

    @property
    def sizes(self):
        """[N,2], (height, width) in px, as stored."""
        return self.index.sizes[self.ids]

    def sample_name(self, i):
        return self.index.names[self.ids[i]]

    def original(self, i):
        """(height, width) before the set's makers resized the picture."""
        return tuple(self.index.original[self.ids[i]].tolist())

    def size(self, i):
        """(height, width), as stored."""
        return tuple(self.index.sizes[self.ids[i]].tolist())

    def left_out(self):
        """-> lines about what is not among its samples: one for each kind, and for each file cut short."""
        if self.passed:
            yield f'passed over: {self.passed}'
        if self.broken:
            yield f'broken, by the index: {self.broken}'
        if self.filtered:
            yield f'left out by the filters: {self.filtered}'
        for file, why in self.cut:
            yield f'not read to its end: {file}: {why}'
        for what, key in (('broken', 'dropped'), ('captions cut', 'cut')):
            if counts := self.encoded and self.encoded[key]:
                said = ', '.join(f'{n:,} {reason}' for reason, n in counts.items())
                yield f'{what}, when it was encoded: {said}'

    def read(self, i) -> Raw:
        """Raises Broken."""
        return self.fetch(self.index.places[self.ids[i]])


def open_source(name, settings, model=None):
    """'FAMILY:WHAT' -> Source.

    emoji  emoji:noto,twemoji  emoji-heldout:noto   the shipped set, all of its styles or some
    wds:PATTERN             webdataset / img2dataset tars, here or at any url that fsspec opens;
                            PATTERN may hold {00000..00041}, {a,b}, * and ?; .tar.gz is held in memory
    tfds:NAME/SPLIT         a TensorFlow Datasets set; tfds:lcm_emoji/train is the shipped one
    array_record:PATTERN    files of tf.train.Examples with an encoded picture
    folder:DIR              pictures with NAME.txt beside them, or metadata.jsonl
    pictures:DIR            pictures alone, to be measured; every caption is empty
    synthetic:N             N made-up pictures
    cache:DIR               what `lcm-jax data cache` wrote, here or copied to gs://, for `model`; its
                            captions, crops and filters were settled then

    Raises InputError for a name, file or set that cannot be opened, if the filters leave nothing,
    and if the share of broken samples or of unreadable files exceeds settings.max_dropped.
    """
    family, _, what = name.partition(':')
    if family not in FAMILIES and Path(name).is_dir():
        raise InputError(
            f'{name} is a folder: write folder:{name}, or without captions pictures:{name}'
        )
    index, fetch, encoded = choose('source', family, FAMILIES)(what, settings, model)
    broken, passed = Drops(), Drops()
    for drops, found in ((broken, index.broken), (passed, index.passed)):
        for sample, reason, detail in found:
            drops.add(reason, sample, detail)
    ids, filtered = keep(index, {} if encoded else limits(settings))
    source = Source(name, index, ids, fetch, broken, filtered, passed, index.cut, encoded)
    if len(index.cut) > settings.max_dropped * index.files:
        file, why = index.cut[0]
        raise InputError(
            f'{name}: {len(index.cut)} of {index.files} files cannot be read to the end, more than '
            f'max_dropped = {settings.max_dropped} of them; first: {file}: {why}'
        )
    broken.check(name, len(index.names), settings.max_dropped)
    if not len(ids):
        reasons = (
            ('the filters drop all', filtered),
            ('broken are all', broken),
            ('passed over are all', passed),
        )
        whys = (f'{said} {len(drops)}: {drops}' for said, drops in reasons if drops)
        raise InputError(f'{name}: no samples; {next(whys, "it is empty")}')
    return source


def open_emoji(split):
    def opened(what, settings, model):
        files = emoji.archives(split, what.split(',') if what else emoji.STYLES)
        return of_files(tars.index, tars.fetch)(files, settings, model)

    return opened


def of_files(index_one, fetch_one):
    """A family of files that are indexed one by one."""

    def opened(what, settings, model):
        urls = expand(what) if isinstance(what, str) else what
        index = gather(urls, index_one, settings.caption, settings.threads)
        return index, functools.partial(fetch_file, fetch_one, urls, settings.caption), None

    return opened


def fetch_file(fetch_one, urls, caption, place):
    return fetch_one(urls[int(place[0])], place[1:], caption)


FAMILIES = {
    'emoji': open_emoji('train'),
    'emoji-heldout': open_emoji('heldout'),
    'wds': of_files(tars.index, tars.fetch),
    'array_record': of_files(records.index_array_record, records.fetch_array_record),
    'tfds': lambda what, settings, model: (*records.open_tfds(what, settings.caption), None),
    'folder': lambda what, settings, model: (*folders.open_folder(what, settings.caption), None),
    'pictures': lambda what, settings, model: (*folders.open_pictures(what), None),
    'synthetic': lambda what, settings, model: (
        *folders.open_synthetic(what, settings.resolution, settings.seed),
        None,
    ),
    'cache': lambda what, settings, model: open_cache(what, settings.resolution, model),
}


def limits(settings):
    """The filters that are on: {what it says: (values of the index, whether a value passes)}."""
    low, score = settings.min_size, {name: i for i, name in enumerate(SCORES)}
    size = lambda index: np.minimum(index.sizes, index.original).min(1)  # noqa: E731
    column = lambda name: lambda index: index.scores[:, score[name]]  # noqa: E731
    rows = (
        ('min_size', low, size, np.greater_equal),
        ('max_watermark', settings.max_watermark, column('watermark'), np.less_equal),
        ('min_aesthetic', settings.min_aesthetic, column('aesthetic'), np.greater_equal),
        ('max_unsafe', settings.max_unsafe, column('unsafe'), np.less_equal),
    )
    return {key: (limit, values, passes) for key, limit, values, passes in rows if limit}


def keep(index, filters):
    """-> rows of the index that every filter passes, and Drops: each under the first that fails it."""
    kept, drops = np.ones(len(index.names), bool), Drops()
    for key, (limit, values, passes) in filters.items():
        value = values(index)
        unknown = kept & np.isnan(value)
        for reason, fails in (
            (f'without what {key} needs', unknown),
            (f'outside {key} = {limit:g}', kept & ~unknown & ~passes(value, limit)),
        ):
            if fails.any():
                first = int(fails.argmax())
                said = '' if np.isnan(value[first]) else f'{value[first]:g}'
                drops.add(reason, index.names[first], said, int(fails.sum()))
            kept &= ~fails
    return np.flatnonzero(kept), drops
