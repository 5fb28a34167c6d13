"""What a run is fed: batches of its data on the mesh, from any step on, and a fixed set to judge by."""

import itertools
from pathlib import Path

import jax
from tqdm import tqdm

from lcm_jax import sharding
from lcm_jax.data.cache_fill import write_cache
from lcm_jax.data.loader import loader
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.encode import encoder
from lcm_jax.logs import say
from lcm_jax.step import DTYPES

OURS = ('cache', 'validation', 'validation_batches')  # keys of `data` that are read here


class Feed:
    """A config's data for a Model, on a mesh. With data.cache it is encoded into `workdir`/cache first."""

    def __init__(self, model, config, mesh, workdir):
        self.model, self.config, self.mesh = model, config, mesh
        self.settings = DataSettings(**{k: v for k, v in config.data.items() if k not in OURS})
        self.home, self.batch = sharding.batch_sharding(mesh), config.train.batch
        self.rows = sharding.local_rows(self.home, self.batch)
        self.tokenizers = model.tokenizers()
        self.source = self.open(config.data.source, Path(workdir) / 'cache')
        held = config.data.validation
        self.held = held and self.open(held, Path(workdir) / 'validation')
        self.loader = self.load(self.source, 0)
        self.sizes = self.loader.shapes  # (height, width) px of each bucket

    def open(self, name, folder):
        if not self.config.data.cache or name.startswith('cache:'):
            return open_source(name, self.settings, self.config.model)
        if not any(folder.glob('part-*.json')):
            self.fill(open_source(name, self.settings), folder)
        sharding.wait('cache')
        return open_source(f'cache:{folder}', self.settings, self.config.model)

    def fill(self, source, folder):
        """Encode the source, each process its part."""
        config = self.config
        encode = encoder(self.model, DTYPES[config.dtype], DTYPES[config.vae_dtype])
        with tqdm(
            total=len(source), desc=f'encoding {source.name}', unit='it', disable=None
        ) as bar:

            def log(done):
                bar.update(jax.process_count() * done - bar.n)

            write_cache(
                folder,
                source,
                self.tokenizers,
                self.settings,
                encode,
                model=config.model,
                batch=min(64, len(source)),
                process=jax.process_index(),
                processes=jax.process_count(),
                log=log,
            )

    def load(self, source, start):
        return loader(
            source,
            () if source.encoded else self.tokenizers,
            self.settings,
            batch=self.batch,
            rows=self.rows,
            start=start,
        )

    def on_mesh(self, batch):
        return sharding.to_global(batch.arrays, self.home, self.rows, self.batch)

    def batches(self, start):
        """-> iterator of (global arrays, names of this process's samples) from step `start` on."""
        self.loader.close()
        self.loader = self.load(self.source, start)
        return ((self.on_mesh(batch), batch.names) for batch in self.loader)

    def validation(self):
        """-> the first batches of the held-out source, always the same."""
        if not self.held:
            return []
        found = self.load(self.held, 0)
        batches = [
            self.on_mesh(b) for b in itertools.islice(found, self.config.data.validation_batches)
        ]
        found.close()
        return batches

    def close(self):
        """Stop reading, and say what was broken on the way."""
        if self.loader.broken:
            say(f'{len(self.loader.broken)} broken samples were replaced: {self.loader.broken}')
        self.loader.close()

    def describe(self):
        """One line of what it is made of."""
        source, dropped = self.source, self.source.broken
        sizes = ', '.join(f'{h} x {w}' for h, w in self.sizes)
        gone = ''.join(f'; left out {d}' for d in (dropped, source.filtered) if d)
        return f'{source.name}: {len(source)} samples, {sizes} px{gone}'
