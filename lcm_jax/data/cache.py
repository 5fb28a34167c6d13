"""Latents and text embeddings in array_record files, so that training need not encode them again.

Each process writes `part-PPPPP-of-QQQQQ`: .array_record holds the samples, each the bytes of its
arrays one after the other; .npz their names, buckets and numbers in the source; .json, written last,
says the model, the resolution, the shapes and the types. A part without its .json is not complete.
"""

import functools
import json
import math
import re
from collections import Counter
from pathlib import Path

import ml_dtypes  # noqa: F401 - so that numpy knows 'bfloat16'
import numpy as np

from lcm_jax.atomic import write_json
from lcm_jax.data.files import listed, opened, reading
from lcm_jax.data.records import check_address, record
from lcm_jax.data.samples import SCORES, Broken, Index, describe
from lcm_jax.data.settings import DataSettings
from lcm_jax.errors import InputError

PART = re.compile(r'part-(\d{5})-of-(\d{5})\.json')
SAME = (  # what all parts agree on
    *('version', 'model', 'resolution', 'shapes', 'arrays'),
    *('fixed', 'source', 'number', 'weights'),
)


def part_name(process, processes):
    """-> the name of its files without suffix."""
    return f'part-{process:05d}-of-{processes:05d}'


def complete(folder):
    """Whether all parts of a cache are there, of however many processes."""
    try:
        return bool(parts_of(str(folder)))
    except InputError:
        return False


class Writer:
    """Writes one process's part: add(...) samples, then close(...). Raises InputError if it is there.

    head: {'model', 'resolution', 'shapes', ...}, where shapes are the buckets' (height, width) in px.
    """

    def __init__(self, folder, head, process=0, processes=1):
        self.stem = Path(folder) / part_name(process, processes)
        if self.stem.with_suffix('.json').exists():
            raise InputError(f'{self.stem}.json exists: the cache is written already')
        from array_record.python.array_record_module import ArrayRecordWriter

        self.stem.parent.mkdir(parents=True, exist_ok=True)
        file = self.stem.with_suffix('.array_record')
        file.unlink(missing_ok=True)
        self.records = ArrayRecordWriter(str(file), 'group_size:1,uncompressed')
        self.head = {'version': 1, **head, 'arrays': {}}
        self.names, self.rows = [], []

    def add(self, name, number, bucket, size, arrays):
        """One sample: its name and number in the source, its bucket, the picture's (height, width)."""
        for key, x in arrays.items():
            said = self.head['arrays'].setdefault(key, {'dtype': str(x.dtype), 'shapes': {}})
            shape = said['shapes'].setdefault(str(bucket), list(x.shape))
            if [str(x.dtype), list(x.shape)] != [said['dtype'], shape]:
                raise ValueError(f'{key} of {name}: {x.dtype} {x.shape}; it was {said}')
        if arrays.keys() != self.head['arrays'].keys():
            raise ValueError(f'{name} has {[*arrays]}; it was {[*self.head["arrays"]]}')
        self.records.write(b''.join(x.tobytes() for x in arrays.values()))
        self.names.append(name)
        self.rows.append((number, bucket, *size))

    def close(self, dropped, cut):
        """Complete the part. {reason: count} of the samples that are not in it; whose caption was cut."""
        self.records.close()
        rows = np.array(self.rows, np.int64).reshape(-1, 4)
        np.savez(self.stem.with_suffix('.npz'), names=json.dumps(self.names), rows=rows)
        said = self.head | {'samples': len(rows), 'dropped': dropped, 'cut': cut}
        write_json(self.stem.with_suffix('.json'), said)


def open_cache(folder, resolution, model=None):
    """A path or gs:// -> Index in the source's order, fetch(place) -> {name: array}, header.

    Raises InputError if a part is missing, not complete or cannot be read, and for a cache that was
    made at another resolution or, where `model` is given, by another model.
    """
    check_address(folder)
    stems, head = parts_of(folder.rstrip('/'))
    for key, asked in (('model', model), ('resolution', resolution)):
        if asked is not None and head[key] != asked:
            raise InputError(f'cache:{folder} is of {key} {head[key]!r}; this run has {asked!r}')
    names, rows = [], []
    for i, stem in enumerate(stems):
        with reading(url := f'{stem}.npz'), opened(url) as file, np.load(file) as got:
            part = got['rows']
            names += json.loads(str(got['names']))
        files = np.full(len(part), i)
        rows.append(np.column_stack([files, np.arange(len(part)), part]))
    rows = np.concatenate(rows)
    order = np.argsort(rows[:, 2], kind='stable')
    rows = rows[order]
    sizes, scores = rows[:, 4:].astype(np.int32), np.full((len(rows), len(SCORES)), np.nan)
    places = rows[:, [0, 1, 3]]  # file, record, bucket
    paths = [f'{stem}.array_record' for stem in stems]
    index = Index([names[i] for i in order], sizes, sizes, scores, places, [], [], 0, len(paths))
    return index, functools.partial(fetch, paths, head['arrays']), head


def parts_of(folder):
    """-> [path or url without suffix], what their headers say, as one. Raises InputError."""
    names = [name for name in listed(folder) if name.startswith('part-')]
    found = [PART.fullmatch(name) for name in names]
    totals = {int(m[2]) for m in found if m}
    if len(totals) != 1:
        what = 'caches of different numbers of processes' if totals else 'no complete cache'
        raise InputError(f'cache:{folder}: {what}; it has {", ".join(names) or "nothing"}')
    total = totals.pop()
    parts = [part_name(i, total) for i in range(total)]
    for part in parts:
        if f'{part}.json' not in names:
            raise InputError(
                f'cache:{folder} is not complete: {part} has not been written to its end'
            )
    stems, heads = [f'{folder}/{part}' for part in parts], []
    for stem in stems:
        with reading(url := f'{stem}.json'), opened(url) as file:
            heads.append(json.load(file))
    filled = [head for head in heads if head['samples']] or heads[:1]
    for head in filled[1:]:
        for name, said in head['arrays'].items():  # a part may lack a bucket that another has
            mine = filled[0]['arrays'].get(name, {'shapes': {}})
            mine['shapes'] = said['shapes'] = mine['shapes'] | said['shapes']
        apart = [key for key in SAME if head.get(key) != filled[0].get(key)]
        if apart:
            key = apart[0]
            raise InputError(
                f'cache:{folder}: its parts were made by different runs: {key} = '
                f'{filled[0].get(key)!r} and {head.get(key)!r}'
            )
    counts = {
        key: sum((Counter(h.get(key)) for h in heads), Counter()) for key in ('dropped', 'cut')
    }
    return stems, filled[0] | counts | {'samples': sum(h['samples'] for h in heads)}


def check_fits(head, name, settings, dtype, weights):
    """InputError for a cache, of this header and name, that a run would have made otherwise.

    settings: the run's; those that act when a cache is made must be those of then, or left at their
    default, which asks for nothing. dtype: of its text embeddings. weights: {component: what those of
    its encoders are known by}.
    """
    for key, had in head.get('fixed', {}).items():
        asked = getattr(settings, key)
        if asked not in (had, getattr(DataSettings, key)):
            raise InputError(
                f'{name} was encoded with data.{key} = {had!r}; this run has {asked!r}: make the '
                f'cache again with it (lcm-jax data cache), or leave it out here'
            )
    for key in ('context', 'pooled'):
        of = head['arrays'].get(key, {'dtype': dtype})['dtype']
        if of != dtype:
            raise InputError(
                f'{name}: its {key} is {of}; this run has dtype = {dtype!r}: make the cache again with '
                f'--dtype {dtype}, or set dtype to what it has'
            )
    had = head.get('weights') or weights
    others = [part for part in weights if had.get(part) != weights[part]]
    if others:
        raise InputError(
            f"{name} was encoded with other weights of {', '.join(others)} than this model's: make the "
            'cache again (lcm-jax data cache)'
        )


def fetch(paths, arrays, place):
    """-> {name: array} of one sample. Raises as `record`, and Broken for one that is too short."""
    file, number, bucket = place.tolist()
    found, out, at = record(paths[file], number), {}, 0
    try:
        for name, said in arrays.items():
            dtype, shape = np.dtype(said['dtype']), said['shapes'][str(bucket)]
            out[name] = np.frombuffer(found, dtype, math.prod(shape), at).reshape(shape)
            at += out[name].nbytes
    except ValueError as e:
        raise Broken('record cannot be read', describe(e)) from e
    return out
