"""Pictures drawn for captions -> numbers: distribution, captions, and distance to a reference's pictures."""

import dataclasses
import io
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from lcm_jax import metrics
from lcm_jax.data.pairs import batches
from lcm_jax.metrics import Statistics
from lcm_jax.processes import gathered
from lcm_jax.tree import digest

SUM = 'sum/'  # what names of sums begin with, where Statistics lie beside them
AMONG = 100  # captions among which a picture must find its own


class Networks(NamedTuple):
    """What looks at pictures; see `features.open_features` and `features.open_lpips`."""

    features: Any  # for FID and KID
    clip: Any = None  # for the CLIP score; None: not measured
    lpips: Any = None  # for the distance to the reference; None: not measured


@dataclasses.dataclass
class Tally:
    """Statistics of the features, and sums of what is measured of each picture. Of parts, they add up."""

    statistics: Statistics | None = None
    sums: dict = dataclasses.field(default_factory=dict)  # name -> [sum, count] float64

    def add(self, other):
        """Count in another tally, of other pictures."""
        mine = self.statistics
        self.statistics = mine.merge(other.statistics) if mine else other.statistics
        for name, x in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + x

    def shared(self):
        """The sum of all processes' tallies, in each of them."""
        out = Tally()
        for blob in gathered(self.dump()):
            if blob:
                out.add(Tally.load(blob))
        return out

    def dump(self):
        """-> bytes; b'' if nothing was added."""
        if self.statistics is None:
            return b''
        file = io.BytesIO()
        sums = {SUM + name: x for name, x in self.sums.items()}
        np.savez(file, **self.statistics.arrays(), **sums)
        return file.getvalue()

    @classmethod
    def load(cls, blob):
        """The inverse of `dump`."""
        with np.load(io.BytesIO(blob)) as found:
            sums = {k.removeprefix(SUM): found[k] for k in found.files if k.startswith(SUM)}
        return cls(Statistics.load(io.BytesIO(blob)), sums)


class Judge:
    """Measures pictures of fixed captions against fixed real ones."""

    def __init__(self, networks, captions, real):
        """captions [N]; real: Statistics."""
        self.networks, self.captions, self.real = networks, captions, real
        self.texts = networks.clip and networks.clip.texts(captions, truncate=True)

    @property
    def protocol(self):
        """What the numbers depend on, besides what drew the pictures."""
        n = self.networks
        return {
            'features': n.features.identity,
            'clip_features': n.clip and n.clip.identity,
            'lpips_features': n.lpips and n.lpips.identity,
            'captions': digest({}, *self.captions),
            'real': digest(self.real.mean, self.real.n),
        }

    def __call__(self, drawn, reference=None):
        """Batches (numbers [b], pictures [b,H,W,3] uint8, seconds of one picture) -> the row of numbers.

        The batches are this process's; all processes call it alike. reference: {number: picture} to
        compare with. -> {'n', 'fid', 'kid', 'kid_std', 'biased', and what there are networks for: 'clip',
        'retrieval', 'lpips', 'psnr'}, and 'seconds' per picture: the median batch's, without the first,
        which may compile; None if there is no other.
        """
        tally, seconds = Tally(), []
        for numbers, pictures, took in drawn:
            features = self.networks.features.images(pictures)
            seen = metrics.looked_at(self.networks.features.identity, *pictures.shape[1:3])
            statistics = Statistics.of(seen, features, numbers)
            values = self.each(numbers, pictures, features, reference or {})
            sums = {k: np.array([np.sum(x, dtype=np.float64), len(x)]) for k, x in values.items()}
            tally.add(Tally(statistics, sums))
            seconds.append(took)
        tally = tally.shared()
        row = {'n': tally.statistics.n, **metrics.compare(self.real, tally.statistics)}
        row |= {name: float(total / count) for name, (total, count) in tally.sums.items()}
        return row | {'seconds': float(np.median(seconds[1:])) if len(seconds) > 1 else None}

    def each(self, numbers, pictures, features, reference):
        """-> {name: [n]} of each picture."""
        out = {}
        if self.networks.clip:
            same = self.networks.clip is self.networks.features
            images = features if same else self.networks.clip.images(pictures)
            out['clip'] = metrics.cosines(images, self.texts[numbers])
            if len(self.texts) >= AMONG:
                out['retrieval'] = metrics.retrieved(images, self.texts, numbers, AMONG)
        known = [i for i, number in enumerate(numbers) if number in reference]
        if known:
            theirs = np.stack([reference[numbers[i]] for i in known])
            out['psnr'] = metrics.psnr(pictures[known], theirs)
            if self.networks.lpips:
                out['lpips'] = self.networks.lpips.distance(pictures[known], theirs)
        return out

    def real_row(self, own, batch=64):
        """own() -> iterator of (number, picture, caption): the captions' real pictures, as a row."""
        renumbered = ((i, picture, caption) for i, (_, picture, caption) in enumerate(own()))
        mine = itertools.islice(
            batches(renumbered, batch), jax.process_index(), None, jax.process_count()
        )
        row = self((numbers, pictures, 0.0) for numbers, pictures in mine)
        return {**row, 'label': 'real pictures', 'steps': None, 'seconds': None}
