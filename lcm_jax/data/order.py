"""Which samples each step of a run sees: a pure function of the step's number."""

import functools

import numpy as np

from lcm_jax.errors import InputError

LABELS, PERMUTATION, SUBSTITUTE, DRAW, CHECK = range(1, 6)  # what a random stream is for


class Order:
    """order(step) -> (bucket, ids [batch]).

    groups: the sample ids of each bucket, none empty (one bucket: one group); batch: samples a step.
    Every bucket is an endless row of fresh permutations of its samples, cut into batches, so in the
    long run every sample is seen equally often, whatever the batch: one bucket's after each epoch, while
    one that is smaller than a batch waits until it fills one. The batches of one epoch come in random
    order. Nothing else enters: a run resumes by asking for a later step, and any
    process can ask for any row. Raises InputError if the batch exceeds all samples.
    """

    def __init__(self, groups, batch, seed):
        self.groups = [np.asarray(ids) for ids in groups]
        self.counts = np.array([len(ids) for ids in groups], np.int64)
        self.batch, self.seed = batch, seed
        if not 1 <= batch <= self.counts.sum():
            raise InputError(
                f'batch of {batch} from {self.counts.sum()} samples: the batch must be 1 or more '
                'and not exceed the set'
            )
        # Kept: as many permutations as an epoch's border needs. Not pickled to worker processes.
        self._build()

    def _build(self):
        self.permutation = functools.lru_cache(2 * len(self.groups))(self._permutation)
        self.labels = functools.lru_cache(2)(self._labels)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ('permutation', 'labels')}

    def __setstate__(self, state):
        vars(self).update(state)
        self._build()

    def begun(self, epoch):
        """Batches of each bucket before an epoch -> [buckets]."""
        return self.counts * epoch // self.batch

    def _labels(self, epoch):
        """The bucket of each of the epoch's steps, shuffled."""
        n = self.begun(epoch + 1) - self.begun(epoch)
        labels = np.repeat(np.arange(len(n)), n)
        return np.random.default_rng((LABELS, self.seed, epoch)).permutation(labels)

    def _permutation(self, bucket, epoch):
        rng = np.random.default_rng((PERMUTATION, self.seed, epoch, bucket))
        return rng.permutation(self.groups[bucket])

    def epoch(self, step):
        """A step -> its epoch, and its number in it."""
        epoch = step * self.batch // int(self.counts.sum())  # never too late: batches round down
        while self.begun(epoch + 1).sum() <= step:
            epoch += 1
        return epoch, step - int(self.begun(epoch).sum())

    def __call__(self, step):
        epoch, at = self.epoch(step)
        labels = self.labels(epoch)
        bucket = int(labels[at])
        nth = self.begun(epoch)[bucket] + np.count_nonzero(labels[:at] == bucket)
        slots = nth * self.batch + np.arange(self.batch)
        epochs, places = np.divmod(slots, self.counts[bucket])
        ids = [self.permutation(bucket, int(e))[p] for e, p in zip(epochs, places, strict=True)]
        return bucket, np.array(ids)

    def substitute(self, bucket, step, row, attempt):
        """The sample that takes the place of a broken one: by chance, of the same bucket."""
        rng = np.random.default_rng((SUBSTITUTE, self.seed, step, row, attempt))
        return int(rng.choice(self.groups[bucket]))


def shuffled(n, batch, seed):
    """-> indices(step): the `batch` sample numbers of a step, each epoch in a fresh random order."""
    order = Order([np.arange(n)], batch, seed)
    return lambda step: order(step)[1]
