"""Bad input from outside: what each says."""

import functools
import io
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from sets import array_record, encoded, example, sample, shard, tar_of

from lcm_jax.data import files, records, tars
from lcm_jax.data.loader import loader
from lcm_jax.data.samples import Broken
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError

BORNE = DataSettings(max_dropped=1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))


JPEG = encoded(kind='JPEG')


@pytest.mark.parametrize(
    ('members', 'reason', 'detail'),
    [
        ([('1.txt', b'alone')], 'no picture', 'it has txt'),
        ([('1.png', encoded())], 'no caption', "no 'txt' among nothing"),
        (sample('1', caption=' \n'), 'empty caption', ''),
        (sample('1', caption=b'\xff\xfe'), 'caption is not UTF-8', 'utf-8'),
        ([('1.png', b'none'), ('1.txt', b'x')], 'picture cannot be read', 'cannot identify image'),
        ([('1.jpg', JPEG[:20]), ('1.txt', b'x')], 'picture cannot be read', ''),
        ([*sample('1')[:1], ('1.json', b'{'), ('1.txt', b'x')], 'JSON cannot be read', 'Expecting'),
        ([*sample('1')[:1], ('1.json', b'[]'), ('1.txt', b'x')], 'JSON cannot be read', 'a list'),
    ],
)
def test_a_bad_sample_is_counted_and_named(tmp_path, members, reason, detail):
    tar = tar_of(tmp_path / 'bad.tar', [*sample('0'), *members, *sample('2')])
    source = open_source(f'wds:{tar}', BORNE)
    assert len(source) == 2 and source.broken.counts == {reason: 1}
    assert detail in source.broken.first[reason] and '<' not in source.broken.first[reason]
    with pytest.raises(
        InputError, match=f'1 of 3 samples are broken.*: 1 {reason} .*bad.tar/1'
    ) as e:
        open_source(f'wds:{tar}', DataSettings())
    assert '\n' not in str(e.value)


def test_several_reasons_make_a_table(tmp_path):
    bad = [*sample('1', caption=''), *sample('2', caption=''), ('3.txt', b'alone')]
    tar = tar_of(tmp_path / 'bad.tar', [*sample('0'), *bad])
    with pytest.raises(InputError) as e:
        open_source(f'wds:{tar}', DataSettings())
    assert str(e.value).splitlines()[1:] == [
        '  2 empty caption (first: bad.tar/1)',
        '  1 no picture (first: bad.tar/3: it has txt)',
    ]


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


def damaged(file):
    """Overwrite a header in the middle."""
    content = bytearray(file.read_bytes())
    at = content.index(b'0003.png')
    content[at : at + 300] = np.random.default_rng(0).bytes(300)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ('harm', 'said'),
    [
        (lambda file: cut(file, 6000), 'unexpected end of data'),
        (lambda file: cut(file, 7000), 'no tar header and no end mark at byte 6656'),
        (lambda file: cut(file, 7680), 'no tar header and no end mark at byte 7680'),
        (damaged, 'no tar header and no end mark at byte'),
    ],
)
def test_a_shard_that_ends_early_keeps_what_comes_before(tmp_path, harm, said):
    for i in range(4):
        shard(tmp_path / f'{i}.tar', 6, seed=i, size=(16, 16))
    whole = len(open_source(f'wds:{tmp_path}/0.tar', BORNE))
    harm(tmp_path / '2.tar')
    source = open_source(f'wds:{tmp_path}/*.tar', DataSettings(max_dropped=0.25))
    assert 3 * whole < len(source) < 4 * whole
    assert [(file, said in why) for file, why in source.cut] == [(f'{tmp_path}/2.tar', True)]
    with pytest.raises(InputError, match=f'1 of 4 files cannot be read.*2.tar: .*{said}') as e:
        open_source(f'wds:{tmp_path}/*.tar', DataSettings())
    assert '\n' not in str(e.value)


class Gone(Exception):
    """Stands for the errors of remote stores, which are not all OSErrors."""


@pytest.fixture
def hasty(monkeypatch):
    """Reads that fail are tried again, twice, at once."""
    monkeypatch.setattr(files, 'WAITS', (0, 0))


@pytest.mark.usefixtures('hasty')
@pytest.mark.parametrize('error', [Gone('503'), OSError('503'), ValueError('503')])
@pytest.mark.parametrize('name', ['x.tar', 'x.tar.gz'])
def test_a_remote_file_that_fails_is_not_taken_for_a_cut_one(tmp_path, monkeypatch, error, name):
    """At any of its reads, while it is indexed and later: not for a broken sample, either."""
    packed = tar_of(tmp_path / name, [*sample('0'), *sample('1')], 'w:gz' if 'gz' in name else 'w')
    url = f'memory://bucket/{name}'
    with fsspec.open(url, 'wb') as out:
        out.write(Path(packed).read_bytes())
    left, fails = 10**9, 3  # reads until one fails, and how many do
    cat_file = MemoryFileSystem.cat_file

    def read(self, size=-1, of=io.BytesIO.read):
        nonlocal left
        left -= 1
        if -fails < left <= 0:
            raise error
        return of(self, size)

    def cat(self, path, **kw):
        return read(self, path, lambda self, path: cat_file(self, path, **kw))

    monkeypatch.setattr(MemoryFile, 'read', read, raising=False)
    monkeypatch.setattr(MemoryFileSystem, 'cat_file', cat)
    source = open_source(f'wds:{url}', DataSettings())
    whole = source.read(0)
    for i in range(1, 10**9 - left - 1):
        left, fails = i, 3
        tars.inflated.cache_clear()
        with pytest.raises(InputError, match=f'cannot read {url}: 503'):
            open_source(f'wds:{url}', BORNE).read(0)
        left, fails = i, 2
        tars.inflated.cache_clear()
        assert open_source(f'wds:{url}', BORNE).read(0) == whole


@pytest.mark.usefixtures('hasty')
def test_a_file_that_is_gone_stops_the_run(tmp_path):
    """Whatever is borne: it says nothing about its samples."""
    file = Path(shard(tmp_path / 'x.tar', 6))
    source = open_source(f'wds:{file}', BORNE)
    file.unlink()
    batches = loader(source, (), BORNE, batch=2)
    with pytest.raises(InputError) as e:
        next(batches)
    batches.close()
    assert str(e.value) == f'cannot read {file}: [Errno 2] No such file or directory: {str(file)!r}'


def test_a_file_that_was_cut_since_has_broken_samples(tmp_path):
    file = Path(shard(tmp_path / 'x.tar', 6))
    source = open_source(f'wds:{file}', BORNE)
    first = source.read(0)
    cut(file, 6000)
    assert source.read(0) == first
    with pytest.raises(Broken, match=r'file ends early.*0 of \d+ bytes at'):
        source.read(5)


@pytest.mark.usefixtures('hasty')
@pytest.mark.parametrize('at', ['opened', 'read'])
def test_remote_array_records_that_fail_are_not_taken_for_cut_ones(monkeypatch, at):
    """As tars; the library gives errors of one kind for all."""
    url, found = 'gs://bucket/x.array_record', [example(image=encoded(), text=b'one')]

    class Failing(list):
        def __getitem__(self, i):
            raise RuntimeError('503')

    fails = 0  # times that the next reader, or opening it, does

    @functools.lru_cache
    def reader(path):
        nonlocal fails
        fails -= 1
        if fails >= 0 and at == 'opened':
            raise RuntimeError('503')
        return Failing(found) if fails >= 0 else found

    monkeypatch.setattr(records, 'reader', reader)
    assert records.index_array_record(url, 'txt').names == ['00000000']
    for read in (records.index_array_record, lambda url, of: records.record(url, 0)):
        reader.cache_clear()
        fails = 3
        with pytest.raises(InputError, match=f'cannot read {url}: 503'):
            read(url, 'txt')
    reader.cache_clear()
    fails = 2
    assert records.fetch_array_record(url, [0], 'txt').captions == ('one',)


def test_array_records_at_an_address_that_is_not_read():
    url = 'memory://bucket/x.array_record'
    with fsspec.open(url, 'wb') as out:
        out.write(b'x')
    with pytest.raises(InputError, match=f'{url}: array_record files are read here or at gs://'):
        open_source(f'array_record:{url}', BORNE)


@pytest.mark.parametrize('pattern', ['memory://bucket/a.tar', 'memory://bucket/*.tar'])
def test_a_store_that_cannot_be_asked(monkeypatch, pattern):
    def fail(*args, **kw):
        raise Gone('no permission')

    for name in ('info', 'glob'):
        monkeypatch.setattr(MemoryFileSystem, name, fail)
    with pytest.raises(InputError, match=r'memory://bucket/.*\.tar: no permission'):
        open_source(f'wds:{pattern}', BORNE)


def test_files_that_are_no_tars(tmp_path):
    (tmp_path / 'text.tar').write_text('no tar at all')
    (tmp_path / 'text.tar.gz').write_text('no gzip at all')
    shard(tmp_path / 'plain.tar', 3)
    noise = [('1.png', np.random.default_rng(0).bytes(20_000)), ('1.txt', b'x')]
    tar_of(tmp_path / 'cut.tar.gz', [*sample('0'), *noise], 'w:gz')
    cut(tmp_path / 'cut.tar.gz', 5000)
    for name, said in (
        ('text.tar', 'truncated header'),
        ('text.tar.gz', 'Not a gzipped file'),
        ('cut.tar.gz', 'Compressed file ended before'),
    ):
        with pytest.raises(InputError, match=f'1 of 1 files cannot be read.*{name}: .*{said}'):
            open_source(f'wds:{tmp_path}/{name}', DataSettings())
    with pytest.raises(InputError, match=r'cannot read .*nope.tar'):
        open_source(f'wds:{tmp_path}/nope.tar', BORNE)
    with pytest.raises(InputError, match=r'no file matches .*nope-\*.tar'):
        open_source(f'wds:{tmp_path}/nope-*.tar', BORNE)
    with pytest.raises(InputError, match=r'cannot read nope://x.tar: Protocol not known: nope'):
        open_source('wds:nope://x.tar', BORNE)


def test_array_records_that_are_none(tmp_path):
    file = tmp_path / 'x.array_record'
    array_record(
        file,
        [
            example(image=encoded(), text=b'one'),
            b'\xff no example',
            *(example(text=b'x', **image) for image in ({}, {'image': []}, {'image': 3})),
            example(text=b'x', image=[encoded(), encoded()]),
        ],
    )
    source = open_source(f'array_record:{file}', BORNE)
    assert len(source) == 1
    assert source.broken.counts == {'record is no tf.train.Example': 1, 'no picture': 4}
    assert [detail for _, reason, detail in source.index.broken if reason == 'no picture'] == [
        'it has text',
        "its 'image' holds 0 values, not one encoded file",
        "its 'image' holds int, not one encoded file",
        "its 'image' holds 2 values, not one encoded file",
    ]
    (tmp_path / 'y.array_record').write_text('no array_record')
    with pytest.raises(InputError, match='1 of 1 files cannot be read'):
        open_source(f'array_record:{tmp_path}/y.array_record', DataSettings())


def test_a_tfds_record_that_cannot_be_read_is_broken(monkeypatch):
    class Set(list):
        def __getitem__(self, i):
            if i == 1:
                raise RuntimeError('corrupted')
            return list.__getitem__(self, i)

    features = {'image': encoded(), 'caption': b'one'}
    flat = features | {'image': np.zeros((4, 4), np.uint8)}
    found = Set([features, features, flat])
    monkeypatch.setattr(records, 'data_source', lambda name: found)
    source = open_source('tfds:any/train', BORNE)
    assert len(source) == 1 and source.read(0).captions == ('one',)
    assert source.broken.first == {
        'record cannot be read': '00000001: corrupted',
        'no picture': "00000002: its 'image' holds ndarray, not one encoded file",
    }
    with pytest.raises(Broken, match=r'record cannot be read.*corrupted'):
        source.fetch([1])


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match='there is no such folder'):
        open_source(f'folder:{tmp_path}/nope', BORNE)
    with pytest.raises(InputError, match='no samples; it is empty'):
        open_source(f'folder:{tmp_path}', BORNE)
    (tmp_path / '1.png').write_bytes(encoded())
    with pytest.raises(InputError, match=r'1 of 1 samples are broken.*1 no caption'):
        open_source(f'folder:{tmp_path}', DataSettings())
    (tmp_path / 'metadata.jsonl').write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match=r'metadata.jsonl:1: not a JSON object with file_name'):
        open_source(f'folder:{tmp_path}', BORNE)


def test_a_picture_that_metadata_names_twice(tmp_path):
    line = '{"file_name": "1.png", "text": "x"}\n'
    (tmp_path / 'metadata.jsonl').write_text(f'{line}\n{line}')
    (tmp_path / '1.png').write_bytes(encoded())
    said = r'metadata.jsonl:3: 1.png is in line 1 too; write one line for each picture: several'
    with pytest.raises(InputError, match=said):
        open_source(f'folder:{tmp_path}', BORNE)


def test_unknown_sources():
    with pytest.raises(InputError, match=r"unknown source 'wsd' \(did you mean 'wds'\?\)"):
        open_source('wsd:x.tar', BORNE)
    with pytest.raises(InputError, match='write tfds:NAME/SPLIT'):
        open_source('tfds:coco', BORNE)
