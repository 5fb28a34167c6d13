"""Caches of latents and text embeddings."""

import dataclasses
import json

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from sets import encoded, noise, sample, tar_of

from lcm_jax.data import cache, records
from lcm_jax.data.cache import Writer
from lcm_jax.data.cache_fill import write_cache
from lcm_jax.data.loader import loader
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError
from lcm_jax.text import Tokenizer

SETTINGS = DataSettings(resolution=64, crop='center', threads=2)


@pytest.fixture(scope='module')
def tokenizers():
    return (Tokenizer.clip(),)


def encode(arrays):
    """Stands for a model: any function of the pixels and of the ids; text in bfloat16."""
    x = arrays['pixels'].astype(np.float32)
    mean = x[:, ::8, ::8] / 255
    context = jnp.asarray(arrays['ids'][:, 0, :, None] * np.ones(3) / 7, jnp.bfloat16)
    return {'mean': mean, 'logvar': -mean, 'context': context, 'pooled': context[:, 0]}


def write(folder, source, tokenizers, settings=SETTINGS, **kw):
    kw = {'model': 'emoji', 'batch': 4} | kw
    return write_cache(folder, source, tokenizers, settings, encode, **kw)


@pytest.mark.parametrize('buckets', [False, True])
@pytest.mark.parametrize('processes', [1, 3])
def test_training_from_a_cache_is_training_from_pixels(tmp_path, tokenizers, buckets, processes):
    settings = dataclasses.replace(SETTINGS, buckets=buckets)
    source = open_source('synthetic:31', settings)
    for p in range(processes):
        write(tmp_path / 'c', source, tokenizers, settings, process=p, processes=processes)
    cached = open_source(f'cache:{tmp_path}/c', settings, model='emoji')
    assert [cached.sample_name(i) for i in range(31)] == [source.sample_name(i) for i in range(31)]
    pixels, latents = (loader(s, tokenizers, settings, batch=5) for s in (source, cached))
    for _ in range(12):
        (a, names), (b, cached_names) = next(pixels), next(latents)
        want = encode(a)
        assert names == cached_names and {*b} == {*want, 'row', 'sizes'}
        for key, x in want.items():
            assert b[key].dtype == x.dtype and b[key].tobytes() == np.asarray(x).tobytes()
        assert np.array_equal(a['sizes'], b['sizes']) and np.array_equal(a['row'], b['row'])
    pixels.close()
    latents.close()


def test_a_cache_that_was_interrupted_does_not_look_complete(tmp_path, tokenizers):
    source = open_source('synthetic:9', SETTINGS)

    def stop(done):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / 'c', source, tokenizers, log=stop)
    with pytest.raises(
        InputError, match=r'no complete cache; it has part-00000-of-00001\.array_record'
    ):
        open_source(f'cache:{tmp_path}/c', SETTINGS)
    assert write(tmp_path / 'c', source, tokenizers)[0] == 9
    assert len(open_source(f'cache:{tmp_path}/c', SETTINGS)) == 9
    with pytest.raises(InputError, match='the cache is written already'):
        write(tmp_path / 'c', source, tokenizers)
    write(tmp_path / 'd', source, tokenizers, process=1, processes=2)
    with pytest.raises(InputError, match='not complete: part-00000-of-00002 has not been written'):
        open_source(f'cache:{tmp_path}/d', SETTINGS)
    with pytest.raises(InputError, match='no complete cache; it has nothing'):
        open_source(f'cache:{tmp_path}/e', SETTINGS)


class Bucket(MemoryFileSystem):
    """Stands for gs://."""

    protocol, store, pseudo_dirs = 'gs', {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('gs://'))


def test_a_cache_elsewhere(tmp_path, tokenizers, monkeypatch):
    """Copied there; its records are read by the array_record library, which knows gs://."""
    write(tmp_path / 'c', open_source('synthetic:9', SETTINGS), tokenizers)
    here = open_source(f'cache:{tmp_path}/c', SETTINGS)
    monkeypatch.setitem(_registry, 'gs', Bucket)
    monkeypatch.setattr(
        cache, 'record', lambda url, i: records.record(url.replace('gs://bucket', str(tmp_path)), i)
    )
    with pytest.raises(InputError, match='cache:gs://bucket/c: no complete cache; it has nothing'):
        open_source('cache:gs://bucket/c', SETTINGS)
    for file in (tmp_path / 'c').iterdir():
        with fsspec.open(f'gs://bucket/c/{file.name}', 'wb') as out:
            out.write(file.read_bytes())
    there = open_source('cache:gs://bucket/c/', SETTINGS)
    for i in range(9):
        assert there.sample_name(i) == here.sample_name(i) and there.size(i) == here.size(i)
        for key, x in here.read(i).items():
            assert np.array_equal(there.read(i)[key], x)
    with fsspec.open('gs://bucket/c/part-00000-of-00001.npz', 'wb') as out:
        out.write(b'PK cut')
    with pytest.raises(InputError, match=r'cannot read gs://bucket/c/part-00000-of-00001\.npz: '):
        open_source('cache:gs://bucket/c', SETTINGS)
    with pytest.raises(InputError, match='s3://b/c: array_record files are read here or at gs://'):
        open_source('cache:s3://b/c', SETTINGS)


def test_a_damaged_index_is_named(tmp_path, tokenizers):
    write(tmp_path / 'c', open_source('synthetic:9', SETTINGS), tokenizers)
    for suffix in ('npz', 'json'):
        file = tmp_path / 'c' / f'part-00000-of-00001.{suffix}'
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(InputError, match=f'cannot read {file}: '):
            open_source(f'cache:{tmp_path}/c', SETTINGS)


def test_a_cache_of_something_else_is_refused(tmp_path, tokenizers):
    source = open_source('synthetic:9', SETTINGS)
    write(tmp_path / 'c', source, tokenizers)
    name = f'cache:{tmp_path}/c'
    with pytest.raises(InputError, match="is of model 'emoji'; this run has 'sdxl'"):
        open_source(name, SETTINGS, model='sdxl')
    with pytest.raises(InputError, match='is of resolution 64; this run has 128'):
        open_source(name, dataclasses.replace(SETTINGS, resolution=128), model='emoji')
    with pytest.raises(InputError, match='is a cache already'):
        write(tmp_path / 'd', open_source(name, SETTINGS), tokenizers)
    write(tmp_path / 'c', source, tokenizers, process=0, processes=2)
    with pytest.raises(InputError, match='different numbers of processes'):
        open_source(name, SETTINGS)
    write(tmp_path / 'e', source, tokenizers, process=0, processes=2)
    write(tmp_path / 'e', source, tokenizers, process=1, processes=2, model='other')
    with pytest.raises(InputError, match='its parts were made by different runs'):
        open_source(f'cache:{tmp_path}/e', SETTINGS)


def test_parts_of_other_settings_or_samples_are_refused(tmp_path, tokenizers):
    source, flipped = open_source('synthetic:9', SETTINGS), dataclasses.replace(SETTINGS, flip=True)
    grown, other = open_source('synthetic:10', SETTINGS), {'weights': {'vae': 'x'}}
    for name, what, key in (
        ('fixed', (source, tokenizers, flipped), {}),
        ('source', (grown, tokenizers), {}),
        ('weights', (source, tokenizers), other),
    ):
        write(tmp_path / name, source, tokenizers, process=0, processes=2)
        write(tmp_path / name, *what, process=1, processes=2, **key)
        with pytest.raises(InputError, match=f'its parts were made by different runs: {name} = '):
            open_source(f'cache:{tmp_path}/{name}', SETTINGS)


def test_broken_samples_are_left_out_and_counted(tmp_path, tokenizers):
    good = [m for i in range(3) for m in sample(f'{i}')]
    bad = [('8.png', encoded(size=(40, 40))[:60]), ('8.txt', b'x')]
    tar = tar_of(tmp_path / 'x.tar', [*good, *bad, *sample('9')])
    borne = dataclasses.replace(SETTINGS, max_dropped=1.0)
    done, broken, _ = write(tmp_path / 'c', open_source(f'wds:{tar}', borne), tokenizers, borne)
    assert done == 4 and broken.counts == {'picture cannot be read': 1}
    cached = open_source(f'cache:{tmp_path}/c', SETTINGS)
    assert [cached.sample_name(i) for i in range(4)] == [f'x.tar/{k}' for k in '0129']
    assert cached.encoded['dropped'] == broken.counts
    with pytest.raises(
        InputError, match=r'1 of 5 samples are broken, more than max_dropped = 0\.05'
    ):
        write(tmp_path / 'd', open_source(f'wds:{tar}', SETTINGS), tokenizers)
    with pytest.raises(InputError, match='no complete cache'):
        open_source(f'cache:{tmp_path}/d', SETTINGS)


def test_filling_stops_once_too_many_are_broken(tmp_path, tokenizers):
    """Here of the second of two processes, before it has encoded anything."""
    bad = [
        m for i in range(8) for m in ((f'{i}.png', encoded(size=(40, 40))[:60]), (f'{i}.txt', b'x'))
    ]
    tar = tar_of(tmp_path / 'x.tar', [*bad, *(m for i in range(12) for m in sample(f'a{i}'))])
    source = open_source(f'wds:{tar}', SETTINGS)
    settings = dataclasses.replace(SETTINGS, max_dropped=0.15)
    with pytest.raises(InputError, match=r'2 of 10 samples are broken.*x.tar/1'):
        write(tmp_path / 'c', source, tokenizers, settings, process=1, processes=2, log=pytest.fail)


@pytest.mark.parametrize('key', ['mean', 'context'])
def test_an_encoding_that_is_not_finite_names_its_sample(tmp_path, tokenizers, key):
    def poisoned(arrays):
        out = {k: np.array(x) for k, x in encode(arrays).items()}
        out[key][2] = np.inf
        return out

    source = open_source('synthetic:4', SETTINGS)
    with pytest.raises(InputError, match=f'synthetic:4: 00000002: its {key} is not finite'):
        write_cache(tmp_path, source, tokenizers, SETTINGS, poisoned, model='emoji', batch=4)


def test_a_part_may_be_empty(tmp_path, tokenizers):
    source = open_source('synthetic:2', SETTINGS)
    for p in range(3):
        write(tmp_path / 'c', source, tokenizers, process=p, processes=3)
    assert len(open_source(f'cache:{tmp_path}/c', SETTINGS)) == 2


def test_arrays_that_change_are_a_fault_of_the_program(tmp_path):
    writer = Writer(tmp_path, {'model': 'm', 'resolution': 8, 'shapes': [(8, 8)]})
    writer.add('a', 0, 0, (8, 8), {'x': np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match='x of b'):
        writer.add('b', 1, 0, (8, 8), {'x': np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match='b has'):
        writer.add('b', 1, 0, (8, 8), {})
    writer.close({}, {})
    head = json.loads((tmp_path / 'part-00000-of-00001.json').read_text())
    assert head['samples'] == 1 and head['arrays']['x'] == {
        'dtype': 'float32',
        'shapes': {'0': [3]},
    }


def test_latents_of_a_real_picture_keep_every_bit(tmp_path):
    x = np.asarray(noise(0, 8, 8), np.float32) / 3
    x[0, 0, 0] = np.nan
    writer = Writer(tmp_path, {'model': 'm', 'resolution': 64, 'shapes': [(64, 64)]})
    writer.add('a', 0, 0, (8, 8), {'mean': x})
    writer.close({}, {})
    got = open_source(f'cache:{tmp_path}', SETTINGS).read(0)
    assert got['mean'].tobytes() == x.tobytes()
