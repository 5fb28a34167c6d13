"""A source, encoded by a model -> a cache."""

import numpy as np

from lcm_jax.data.cache import Writer
from lcm_jax.data.loader import Maker, iterate
from lcm_jax.data.samples import Broken, Drops
from lcm_jax.errors import InputError


def write_cache(
    folder, source, tokenizers, settings, encode, *, model, batch, process=0, processes=1, log=None
):
    """Encode the samples i of a source with i % processes == process -> samples written, Drops.

    encode({'pixels', 'ids', 'sizes'}, [batch, ...] each as `loader` gives them) -> {'mean', 'logvar',
    'context', ...}, arrays of as many rows; it is always given full batches of one shape. model: the
    name that a run which reads the cache must have. Crops, flips and captions are those of step 0 and
    row i. log(samples done) is called after each batch. Raises InputError if the cache is there, and
    if more than settings.max_dropped of the samples are broken.
    """
    if source.encoded:
        raise InputError(f'{source.name} is a cache already')
    maker = One(source, tuple(tokenizers), settings)
    head = {'model': model, 'resolution': settings.resolution, 'shapes': maker.shapes}
    writer = Writer(folder, head, process, processes)
    waiting, broken, done = [[] for _ in maker.shapes], Drops(), 0

    def flush(bucket):
        nonlocal done
        items, waiting[bucket] = waiting[bucket], []
        full = items + items[:1] * (batch - len(items))
        arrays = {key: np.stack([item[3][key] for item in full]) for key in full[0][3]}
        out = {key: np.asarray(x) for key, x in encode(arrays).items()} | {'sizes': arrays['sizes']}
        for j, (i, name, size, _) in enumerate(items):
            writer.add(name, i, bucket, size, {key: x[j] for key, x in out.items()})
        done += len(items)
        if log:
            log(done)

    for i, bucket, name, arrays, fault in iterate(
        maker.item, range(process, len(source), processes), settings
    ):
        if fault:
            broken.add(fault[0], name, fault[1])
            continue
        waiting[bucket].append((i, name, source.size(i), arrays))
        if len(waiting[bucket]) == batch:
            flush(bucket)
    for bucket, items in enumerate(waiting):
        if items:
            flush(bucket)
    if len(broken) > settings.max_dropped * (done + len(broken)):
        raise InputError(
            f'{source.name}: {len(broken)} of {done + len(broken)} samples are broken, more than '
            f'max_dropped = {settings.max_dropped} of them: {broken}'
        )
    writer.close(broken.counts)
    return done, broken


class One(Maker):
    """Makes single samples, in the source's order."""

    def __init__(self, source, tokenizers, settings):
        super().__init__(source, tokenizers, settings, 1, (0,))
        self.bucket = np.zeros(len(source), int)
        for bucket, ids in enumerate(self.order.groups):
            self.bucket[ids] = bucket

    def item(self, i):
        """-> i, bucket, name, arrays, None; or (reason, detail) in place of arrays that are none."""
        bucket, name = int(self.bucket[i]), self.source.sample_name(i)
        try:
            arrays, caption = self.sample(i, 0, i, self.shapes[bucket])
        except Broken as e:
            return i, bucket, name, {}, (e.reason, e.detail)
        if self.tokenizers:
            arrays['ids'] = self.tokens([caption])[0][0]
        return i, bucket, name, arrays, None
