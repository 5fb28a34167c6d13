"""What a run is fed: batches of its data on the mesh, from any step on, and a fixed set to judge by."""

import itertools
from functools import partial
from pathlib import Path

import jax

from lcm_jax import processes, sharding
from lcm_jax.data.cache import check_fits
from lcm_jax.data.loader import loader
from lcm_jax.data.settings import DataSettings, check_latents
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError
from lcm_jax.logs import say
from lcm_jax.run_cache import ensure, identity
from lcm_jax.step import cached

OURS = ('cache', 'validation', 'validation_batches')  # keys of `data` that are read here


class Feed:
    """A config's data for a Model, on a mesh. With data.cache it is encoded into `workdir`/cache first."""

    def __init__(self, model, config, mesh, workdir):
        self.model, self.config = model, config
        self.settings = DataSettings(**{k: v for k, v in config.data.items() if k not in OURS})
        check_latents(self.settings)
        self.home, self.batch = sharding.batch_sharding(mesh), config.train.batch
        self.rows = sharding.local_rows(self.home, self.batch)
        self.tokenizers = model.tokenizers
        self.samples = {}  # key of data -> `identity` of what was opened last for it
        self.source = self.open('source', Path(workdir) / 'cache')
        self.held = config.data.validation and self.open('validation', Path(workdir) / 'validation')
        if self.held:
            if cached(config) and not self.held.encoded:
                raise InputError(
                    f'data.validation {self.held.name} is no cache, but data.source is, and a run from '
                    'one has no encoders in memory: encode it too (lcm-jax data cache)'
                )
            self.load(self.held, 0).close()  # refused now rather than after compiling
        self.loader = self.load(self.source, 0)
        self.sizes = self.loader.shapes  # (height, width) px of each bucket
        self.size = self.sizes[self.loader.order.counts.argmax()]  # of most samples

    def open(self, key, folder):
        """The Source to read that data.`key` names, encoded into `folder` if that is asked for."""
        name = self.config.data[key]
        if self.config.data.cache and not name.startswith('cache:'):
            ensure(folder, name, self.model, self.config, self.settings, partial(self.look, key))
            name = f'cache:{folder}'
        return self.look(key, name)

    def look(self, key, name):
        """Open a source of data.`key`, and say what it leaves out -> Source.

        InputError also unless all processes find the same samples in it, and for a cache that was made
        otherwise than this run would.
        """
        source = open_source(name, self.settings, self.config.model)
        for line in source.left_out():
            say(f'{source.name}: {line}')
        self.samples[key] = identity(source)
        processes.alike(f'data.{key} {name}', self.samples[key])
        if source.encoded:
            weights = self.model.marks(self.model.encoders)
            check_fits(source.encoded, source.name, self.settings, self.config.dtype, weights)
        return source

    def load(self, source, start):
        """-> the loader of this process's rows of the batches of a Source, from step `start` on."""
        return loader(
            source,
            () if source.encoded else self.tokenizers,
            self.settings,
            batch=self.batch,
            rows=self.rows,
            start=start,
        )

    def on_mesh(self, batch):
        """A batch of this process's rows -> {name: global array}."""
        return sharding.to_global(batch.arrays, self.home, self.rows, self.batch)

    def batches(self, start):
        """-> iterator of (global arrays, names of this process's samples) from step `start` on.

        What is broken or cut is told when there is a new kind of it, and after the first epoch.
        """
        self.loader.close()
        self.loader = found = self.load(self.source, start)
        before, (first, _) = (0, False), found.order.epoch(start)
        for step, batch in enumerate(found, start):
            now = len(found.broken.counts | found.cut.counts), found.order.epoch(step)[0] > first
            if now != before:
                tell(found)
            before = now
            yield self.on_mesh(batch), batch.names

    def validation(self):
        """-> the first batches of the held-out source, always the same."""
        if not self.held:
            return []
        found = self.load(self.held, 0)
        batches = [
            self.on_mesh(b) for b in itertools.islice(found, self.config.data.validation_batches)
        ]
        tell(found)
        found.close()
        return batches

    def close(self):
        """Stop reading, and tell what was broken or cut on the way."""
        tell(self.loader)
        self.loader.close()

    def describe(self):
        """One line of what it is made of."""
        sizes = ', '.join(f'{h} x {w}' for h, w in self.sizes)
        return f'{self.source.name}: {len(self.source)} samples, {sizes} px'


def tell(found):
    """Print what a loader has replaced or cut: in each process, as each loads rows of its own."""
    mine = f'process {jax.process_index()}: ' if jax.process_count() > 1 else ''
    for line in found.told():
        print(f'{mine}{found.maker.source.name}: {line}', flush=True)
