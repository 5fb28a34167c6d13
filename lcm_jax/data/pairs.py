"""Pictures and their captions in a source's own order, each once: what is measured, not trained on."""

import hashlib
import itertools

import numpy as np

from lcm_jax.data.loader import One, iterate
from lcm_jax.data.samples import Broken, Drops
from lcm_jax.errors import InputError
from lcm_jax.logs import say


class Pairs(One):
    """Single samples of a source, by number; cut to its settings' resolution from the middle."""

    def __init__(self, source, settings, ids):
        if source.encoded:
            raise InputError(f'{source.name} holds no pictures; name what it was made of')
        super().__init__(source, (), settings)
        self.ids = np.asarray(ids)

    def pair(self, j):
        """-> number, and what `one` gives."""
        i = int(self.ids[j])
        return i, *self.one(i)

    def digest(self, j):
        """-> sha256 of a sample's name and its picture as it is stored, or of why it cannot be read."""
        i = int(self.ids[j])
        try:
            picture = self.source.read(i).picture
        except Broken as e:
            picture = e.reason.encode()
        raw = picture if isinstance(picture, bytes) else np.ascontiguousarray(picture).tobytes()
        return hashlib.sha256(self.source.sample_name(i).encode() + raw).digest()


def picked(source, limit, seed):
    """-> ids: `limit` samples of a source by chance, or, if it is 0, all; in their order.

    Where the source has fewer, all of them as often as it takes. seed: as numpy's `default_rng` takes it.
    """
    n = len(source)
    if not 0 < limit < n:
        return np.arange(limit or n) % n
    return np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def spread(n, most):
    """-> `most` of the numbers 0..n-1, evenly apart; all of them if there are no more.

    A set lies in its source's order, by style or by shard: its first numbers would be one kind.
    """
    return np.linspace(0, n, min(n, most), endpoint=False).astype(int)


def pairs(source, settings, ids):
    """Source, numbers [N] of its samples -> iterator of (number, pixels [h,w,3] uint8, caption).

    Broken samples are left out, which is said once all are given; InputError with their table if too large
    a share is broken.
    """
    reader, broken, given = Pairs(source, settings, ids), Drops(), 0
    for number, name, arrays, caption, fault in iterate(reader.pair, range(len(ids)), settings):
        if fault:
            broken.add(fault[0], name, fault[1])
        else:
            given += 1
            yield number, arrays['pixels'], caption
    broken.check(source.name, given, settings.max_dropped)
    if broken:
        say(f'{source.name}: left out {broken}')


def batches(samples, size):
    """Iterator of (number, picture, caption) -> iterator of (numbers [b], pictures [b,h,w,3]), b <= size."""
    samples = iter(samples)
    while some := [*itertools.islice(samples, size)]:
        numbers, pictures, _ = zip(*some, strict=True)
        yield np.array(numbers), np.stack(pictures)


def content(source, settings, ids):
    """-> hexadecimal hash of the samples' names and stored pictures, in their order."""
    reader, whole = Pairs(source, settings, ids), hashlib.sha256()
    for digest in iterate(reader.digest, range(len(ids)), settings):
        whole.update(digest)
    return whole.hexdigest()[:16]
