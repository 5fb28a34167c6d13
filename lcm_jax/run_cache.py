"""The cache that a run makes of its own data: what it was made of, and whether that is still there."""

import dataclasses
import json

import jax
from tqdm import tqdm

from lcm_jax.atomic import write_json
from lcm_jax.data.cache import complete, part_name
from lcm_jax.data.cache_fill import write_cache
from lcm_jax.data.sources import open_source
from lcm_jax.encode import at_once, encoder
from lcm_jax.errors import InputError
from lcm_jax.logs import say
from lcm_jax.models.shapes import DTYPES
from lcm_jax.peers import meet
from lcm_jax.tree import digest

MADE_OF = 'made_of.json'  # in a cache's folder
STAMP = 'stamp'  # in it: of the sizes and dates of the files; it may change where they do not
HOW = ('source', 'threads', 'workers', 'max_dropped')  # settings that it does not depend on


def ensure(folder, name, model, config, settings, look):
    """Encode the source `name` into `folder`, each process its part, unless that is there already.

    look(name) -> Source, opened and checked. Raises InputError for a folder, whole or begun, that was
    made of something else.
    """
    filled = complete(folder)
    source = None if filled else look(name)
    samples = still_there(name, settings, folder) if filled else identity(source)
    made_of = all_of(name, model, config, settings)
    made_of |= {f'samples.{k}': x for k, x in samples.items()}
    check_made_of(folder / MADE_OF, made_of)
    if filled:
        return
    meet('cache')  # all look before one writes
    fill(folder, source, made_of | {STAMP: source.index.stamp}, model, config, settings)
    meet('cache filled')


def all_of(name, model, config, settings):
    """What a cache depends on besides the samples -> {key of the config: value}.

    'source' is the name, 'weights.PART' what the encoders' weights are known by.
    """
    kept = {f'data.{k}': x for k, x in dataclasses.asdict(settings).items() if k not in HOW}
    kept |= {f'weights.{k}': x for k, x in model.marks(model.encoders).items()}
    return {k: config[k] for k in ('model', 'dtype', 'vae_dtype')} | kept | {'source': name}


def identity(source):
    """What the order of a source's samples depends on -> their number, digests of names and sizes."""
    names = [source.sample_name(i) for i in range(len(source))]
    sizes = digest({'sizes': source.sizes})
    return {'number': len(names), 'names': digest({}, names), 'sizes': sizes}


def still_there(name, settings, folder):
    """-> `identity` of what a complete cache was made of; {} if it cannot be opened any more."""
    try:
        source = open_source(name, settings)
    except InputError as e:
        say(f'{e}; its cache is used as it is')
        return {}
    if read(folder / MADE_OF).get(STAMP, source.index.stamp) != source.index.stamp:
        say(
            f'{name}: sizes or dates of its files are others than when {folder} was made of them; if '
            'pictures or captions have changed, delete that folder to have it made again'
        )
    return identity(source)


def read(file):
    """What a cache was made of -> {key: value}; {} if nothing says so."""
    return json.loads(file.read_text()) if file.is_file() else {}


def check_made_of(file, now):
    """InputError for a cache that was made of something else."""
    before = read(file) or now
    changed = [k for k in now if before.get(k) != now[k]]
    if changed:
        key = changed[0]
        raise InputError(
            f'{file.parent} was made with {key} = {before.get(key)!r} (now {now[key]!r}); go on with '
            'its settings, give another workdir, or delete that folder to have it made again'
        )


def fill(folder, source, made_of, model, config, settings):
    """Encode this process's part, unless that was written before an interruption."""
    process, processes = jax.process_index(), jax.process_count()
    part = part_name(process, processes)
    if process == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob('part-*'):  # of a run in another number of processes
            if part.partition('-of-')[2] != file.stem.partition('-of-')[2]:
                file.unlink()
        write_json(folder / MADE_OF, made_of)
    if (folder / f'{part}.json').is_file():
        return
    encode = encoder(model, DTYPES[config.dtype], DTYPES[config.vae_dtype])
    with tqdm(total=len(source), desc=f'encoding {source.name}', unit='it', disable=None) as bar:

        def log(done):
            bar.update(processes * done - bar.n)

        write_cache(
            folder,
            source,
            model.tokenizers,
            settings,
            encode,
            model=config.model,
            weights=model.marks(model.encoders),
            batch=at_once(settings.resolution, len(source)),
            process=process,
            processes=processes,
            log=log,
        )
