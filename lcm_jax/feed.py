"""What a run is fed: batches of its data on the mesh, from any step on, and a fixed set to judge by."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
from tqdm import tqdm

from lcm_jax import sharding
from lcm_jax.atomic import write_json
from lcm_jax.data.cache import complete, part_name
from lcm_jax.data.cache_fill import write_cache
from lcm_jax.data.loader import loader
from lcm_jax.data.settings import DataSettings, check_latents
from lcm_jax.data.sources import open_source
from lcm_jax.encode import at_once, encoder
from lcm_jax.errors import InputError
from lcm_jax.logs import say
from lcm_jax.peers import meet
from lcm_jax.step import DTYPES
from lcm_jax.tree import digest

MADE_OF = 'made_of.json'  # in a cache's folder
HOW = ('source', 'threads', 'workers', 'max_dropped')  # what it does not depend on
OURS = ('cache', 'validation', 'validation_batches')  # keys of `data` that are read here


def check_made_of(file, now):
    """InputError for a cache that was made of something else."""
    before = json.loads(file.read_text()) if file.is_file() else now
    changed = [k for k in now if before.get(k) != now[k]]
    if changed:
        key = changed[0]
        raise InputError(
            f'{file.parent} was made with {key} = {before.get(key)!r} (now {now[key]!r}); go on with '
            'its settings, give another workdir, or delete that folder to have it made again'
        )


def changed(folder, since):
    """Whether a file in a folder, a caption perhaps, was written after a time, in seconds."""
    return any(file.stat().st_mtime > since for file in Path(folder).rglob('*'))


def check_dtype(source, dtype):
    """InputError for a cache whose text embeddings are of another type than the run's."""
    arrays = source.encoded['arrays'] if source.encoded else {}
    for key in ('context', 'pooled'):
        if key in arrays and arrays[key]['dtype'] != dtype:
            raise InputError(
                f'{source.name}: its {key} is {arrays[key]["dtype"]}; this run has dtype = {dtype!r}: '
                f'make the cache again with --dtype {dtype}, or set dtype to what it has'
            )


def check_weights(source, marks):
    """InputError for a cache that other encoders made; marks: {component: what its weights are known by}."""
    before = source.encoded.get('weights') or marks
    changed = [part for part in marks if before.get(part) != marks[part]]
    if changed:
        raise InputError(
            f"{source.name} was encoded with other weights of {', '.join(changed)} than this model's: "
            'make the cache again (lcm-jax data cache)'
        )


def check_fixed(source, settings):
    """InputError for settings that acted when a cache was made, and were others then.

    What is left at its default asks for nothing.
    """
    for key, had in (source.encoded or {}).get('fixed', {}).items():
        asked = getattr(settings, key)
        if asked not in (had, getattr(DataSettings, key)):
            raise InputError(
                f'{source.name} was encoded with data.{key} = {had!r}; this run has {asked!r}: make the '
                f'cache again with it (lcm-jax data cache), or leave it out here'
            )


def identity(source):
    """What the order of a source's samples depends on -> their number, digests of names and sizes."""
    names = [source.sample_name(i) for i in range(len(source))]
    sizes = digest({'sizes': source.sizes})
    return {'number': len(names), 'names': digest({}, names), 'sizes': sizes}


class Feed:
    """A config's data for a Model, on a mesh. With data.cache it is encoded into `workdir`/cache first."""

    def __init__(self, model, config, mesh, workdir):
        self.model, self.config, self.mesh = model, config, mesh
        self.settings = DataSettings(**{k: v for k, v in config.data.items() if k not in OURS})
        check_latents(self.settings)
        self.home, self.batch = sharding.batch_sharding(mesh), config.train.batch
        self.rows = sharding.local_rows(self.home, self.batch)
        self.tokenizers = model.tokenizers
        self.samples = {}  # key of data -> `identity` of what was opened last for it
        self.source = self.open('source', Path(workdir) / 'cache')
        self.held = config.data.validation and self.open('validation', Path(workdir) / 'validation')
        if self.held:
            self.load(self.held, 0).close()  # refused now rather than after compiling
        self.loader = self.load(self.source, 0)
        self.sizes = self.loader.shapes  # (height, width) px of each bucket
        self.size = self.sizes[self.loader.order.counts.argmax()]  # of most samples

    def open(self, key, folder):
        """The Source to read that data.`key` names, encoded into `folder` if that is asked for."""
        name = self.config.data[key]
        if not self.config.data.cache or name.startswith('cache:'):
            source = self.look(key, name)
            check_fixed(source, self.settings)
            check_dtype(source, self.config.dtype)
            if source.encoded:
                check_weights(source, self.model.marks(self.model.encoders))
            return source
        filled = complete(folder)
        source = None if filled else self.look(key, name)
        samples = self.still_there(name, folder) if filled else self.samples[key]
        made_of = self.made_of(name) | {f'samples.{k}': x for k, x in samples.items()}
        check_made_of(folder / MADE_OF, made_of)
        if not filled:
            meet('cache')  # all look before one writes
            self.fill(source, folder, made_of)
            meet('cache filled')
        return self.look(key, f'cache:{folder}')

    def still_there(self, name, folder):
        """-> `identity` of what a complete cache was made of; {} if it cannot be opened any more."""
        try:
            source = open_source(name, self.settings)
        except InputError as e:
            say(f'{e}; its cache is used as it is')
            return {}
        if name.startswith('folder:') and changed(name[7:], (folder / MADE_OF).stat().st_mtime):
            say(f'{name} has changed since {folder} was made of it: delete that to encode it again')
        return identity(source)

    def look(self, key, name):
        """Open a source of data.`key`, and say what it leaves out -> Source.

        InputError also unless all processes find the same samples in it.
        """
        source = open_source(name, self.settings, self.config.model)
        for line in source.left_out():
            say(f'{source.name}: {line}')
        self.samples[key] = identity(source)
        sharding.alike(f'data.{key} {name}', self.samples[key])
        return source

    def made_of(self, name):
        """All that a cache depends on -> {key of the config: value}.

        'source' is the name, 'weights.PART' what the encoders' weights are known by.
        """
        config, settings = self.config, dataclasses.asdict(self.settings)
        kept = {f'data.{k}': x for k, x in settings.items() if k not in HOW}
        kept |= {f'weights.{k}': x for k, x in self.model.marks(self.model.encoders).items()}
        return {k: config[k] for k in ('model', 'dtype', 'vae_dtype')} | kept | {'source': name}

    def fill(self, source, folder, made_of):
        """Encode the source, each process its part, unless that is there already."""
        config = self.config
        part = part_name(jax.process_index(), jax.process_count())
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob('part-*'):  # of a run in another number of processes
                if part.partition('-of-')[2] != file.stem.partition('-of-')[2]:
                    file.unlink()
            write_json(folder / MADE_OF, made_of)
        if (folder / f'{part}.json').is_file():
            return
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
                weights=self.model.marks(self.model.encoders),
                batch=at_once(self.settings.resolution, len(source)),
                process=jax.process_index(),
                processes=jax.process_count(),
                log=log,
            )

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
        sizes = ', '.join(f'{h} x {w}' for h, w in self.sizes)
        return f'{self.source.name}: {len(self.source)} samples, {sizes} px'
