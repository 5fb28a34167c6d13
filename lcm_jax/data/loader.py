"""Sources -> batches, by grain: deterministic, and resumable at any step."""

import functools
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from lcm_jax.data.order import Order
from lcm_jax.data.pictures import draw, nearest, prepare, shapes
from lcm_jax.data.samples import Broken, Drops, decode
from lcm_jax.errors import InputError

TRIES = 100  # samples for one row, before the source is given up
FEW = 10  # broken samples that say nothing about their share yet
FOREVER = 1 << 40  # steps


class Batch(NamedTuple):
    """Some rows of one step. arrays: {name: [b, ...]}, see `loader`; names [b] of the samples."""

    arrays: dict
    names: list


def groups(source, settings):
    """The samples of each bucket -> [((height, width), ids)], none empty."""
    if source.encoded:
        table = source.encoded['shapes']
        bucket = source.index.places[source.ids, -1]
    elif settings.buckets:
        table = shapes(settings.resolution)
        bucket = nearest(source.sizes, table)
    else:
        table, bucket = [(settings.resolution,) * 2], np.zeros(len(source), int)
    found = [(tuple(shape), np.flatnonzero(bucket == i)) for i, shape in enumerate(table)]
    return [(shape, ids) for shape, ids in found if len(ids)]


class Maker:
    """Makes any rows of any step, by itself: what threads and worker processes run."""

    def __init__(self, source, tokenizers, settings, batch, rows):
        self.source, self.tokenizers, self.settings = source, tokenizers, settings
        self.shapes, ids = zip(*groups(source, settings), strict=True)
        try:
            self.order, self.rows = Order(ids, batch, settings.seed), rows
        except InputError as e:
            raise InputError(f'{source.name}: {e}') from e

    def sample(self, i, step, row, shape):
        """-> arrays of one sample, and its caption if it is still to be read. Raises Broken."""
        if self.source.encoded:
            return self.source.read(i), None
        raw = self.source.read(i)
        drawn = draw(self.settings.seed, step, row, self.settings)
        pixels, sizes = prepare(decode(raw.picture), self.source.original(i), shape, drawn)
        caption = raw.captions[int(drawn.caption * len(raw.captions))]
        return {'pixels': pixels, 'sizes': sizes}, caption

    def tokens(self, captions):
        """-> ids [b,E,L] int32, and [b] which captions were cut."""
        read = [tokenizer.cut(captions) for tokenizer in self.tokenizers]
        too_long = [
            lengths > t.length for t, (_, lengths) in zip(self.tokenizers, read, strict=True)
        ]
        return np.stack([ids for ids, _ in read], 1), np.any(too_long, 0)

    def slot(self, step, row, i, bucket, broken):
        """The sample of one row -> name, arrays, caption; None if TRIES of them are broken.

        Each that is broken is noted, and replaced by another.
        """
        for attempt in range(1, TRIES + 1):
            name = self.source.sample_name(i)
            try:
                return name, *self.sample(i, step, row, self.shapes[bucket])
            except Broken as e:
                broken.append((e.reason, name, e.detail))
            i = self.order.substitute(bucket, step, row, attempt)
        return None

    def step(self, step):
        """-> (arrays, names, [(reason, name, detail)] of the broken, names of those whose caption was cut).

        No names: given up.
        """
        bucket, ids = self.order(step)
        broken = []
        slots = []
        for row in self.rows:
            slots.append(self.slot(step, row, ids[row], bucket, broken))
            if slots[-1] is None:
                return {}, [], broken, []
        names, parts, captions = zip(*slots, strict=True)
        arrays = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        arrays['row'] = np.array(self.rows, np.int32)
        cut = []
        if self.tokenizers and captions[0] is not None:
            arrays['ids'], too_long = self.tokens(captions)
            cut = [names[j] for j in np.flatnonzero(too_long)]
        return arrays, list(names), broken, cut


class One(Maker):
    """Makes single samples, in the source's order."""

    def __init__(self, source, tokenizers, settings):
        super().__init__(source, tokenizers, settings, 1, (0,))
        self.bucket = np.zeros(len(source), int)
        for bucket, ids in enumerate(self.order.groups):
            self.bucket[ids] = bucket

    def one(self, i):
        """-> name, arrays, caption, None; or name, {}, None, (reason, detail) of a broken sample."""
        name = self.source.sample_name(i)
        try:
            return name, *self.sample(i, 0, i, self.shapes[self.bucket[i]]), None
        except Broken as e:
            return name, {}, None, (e.reason, e.detail)

    def item(self, i):
        """-> i, bucket, name, arrays, whether its caption was cut, None; or {} and (reason, detail)."""
        name, arrays, caption, fault = self.one(i)
        cut = False
        if arrays and self.tokenizers:
            (arrays['ids'],), (cut,) = self.tokens([caption])
        return i, int(self.bucket[i]), name, arrays, bool(cut), fault


class Loader:
    """Iterator of Batches. Counts what it has given out: `loaded`, and `broken` and `cut` (Drops).

    `order` is its `Order`, `shapes` the (height, width) in px of each bucket.
    """

    def __init__(self, maker, start):
        self.maker, self.settings = maker, maker.settings
        self.order, self.shapes = maker.order, maker.shapes
        self.loaded, self.broken, self.cut = 0, Drops(), Drops()
        self.steps = iterate(maker.step, range(start, FOREVER), self.settings)

    def __iter__(self):
        return self

    def __next__(self):
        """Raises InputError with the table if too large a share of the samples is broken."""
        arrays, names, broken, cut = next(self.steps)
        for one in broken:
            self.broken.add(*one)
        self.loaded += len(names)
        for one in cut:
            self.cut.add(cut_reason(self.maker.tokenizers), one)
        name = self.maker.source.name
        if not names:
            raise InputError(f'{name}: {TRIES} broken samples one after the other: {self.broken}')
        if len(self.broken) >= FEW:
            self.broken.check(name, self.loaded, self.settings.max_dropped)
        return Batch(own(arrays, self.settings), names)

    def told(self):
        """-> lines about what it has given out otherwise than it is stored, one for each kind."""
        if self.broken:
            yield f'{len(self.broken):,} broken samples were replaced: {self.broken}'
        if self.cut:
            yield f'captions cut, of {self.loaded:,}: {self.cut}'

    def close(self):
        """Stop the threads and the workers."""
        self.steps.close()


def loader(source, tokenizers, settings, *, batch, rows=None, start=0):
    """A Source -> Loader of its batches from step `start` on.

    tokenizers: a `text.Tokenizer` for each text encoder; batch: samples of a step over all processes;
    rows: those of them that this process loads (default: all). A Batch's arrays are numpy, with b
    rows:

        row     [b] int32           the row's number in the whole batch
        pixels  [b,h,w,3] uint8
        ids     [b,E,L] int32       captions that are too long are cut, and counted
        sizes   [b,6] float32       see `conditioning.micro_conditioning`

    A cache gives row, sizes and what is in it in place of pixels and ids: mean and logvar [b,h,w,C],
    context [b,L,D], and pooled [b,P] where the model has that.

    All of it is a function of the source, the settings, the batch and the step: not of the processes,
    threads, workers, or of where the run started. A broken sample is counted, and replaced by another
    of its bucket, chosen by seed, step, row and attempt. Raises InputError if the batch exceeds the
    source.
    """
    rows = np.arange(batch) if rows is None else np.asarray(rows)
    return Loader(Maker(source, tuple(tokenizers), settings, batch, rows), start)


def cut_reason(tokenizers):
    """What captions that these cut are counted under."""
    return f'longer than {min(t.length for t in tokenizers)} tokens'


def own(arrays, settings):
    """Copies of what workers sent: it lies in shared memory, which must not outlive them and is scarce."""
    return {key: np.array(x) for key, x in arrays.items()} if settings.workers else arrays


def begin(*_):
    """A worker reads on after SIGTERM, which goes to all of a job: the run ends it when it has saved.

    It ends with the run itself, however that ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def iterate(function, numbers, settings):
    """function over a range of numbers, ahead of time, by settings.threads and settings.workers.

    An InputError of it is raised when its turn comes: grain would add to its message.
    """
    made = grain.MapDataset.range(numbers.start, numbers.stop, numbers.step)
    made = made.map(functools.partial(tried, function))
    ahead = grain.ReadOptions(
        num_threads=settings.threads, prefetch_buffer_size=settings.threads + 1
    )
    made = made.to_iter_dataset(ahead)
    if settings.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own, which are left as they are
        made = made.mp_prefetch(
            grain.MultiprocessingOptions(settings.workers), worker_init_fn=begin
        )
    made = iter(made)
    try:
        yield from map(given, made)
    finally:
        made.close()


def tried(function, number):
    """function(number), or the InputError that it raises."""
    try:
        return function(number)
    except InputError as e:
        return e


def given(found):
    """What `tried` found; raises what is an error."""
    if isinstance(found, InputError):
        raise found
    return found
