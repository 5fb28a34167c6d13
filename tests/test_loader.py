"""Batches: what is in them, and that nothing but step and row decides it."""

import dataclasses
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sets import encoded, file_of, noise, shard, tar_of

from lcm_jax.data.loader import groups, loader
from lcm_jax.data.pictures import Draw, draw, nearest, prepare, shapes
from lcm_jax.data.samples import Broken
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError
from lcm_jax.text import Tokenizer

SETTINGS = DataSettings(resolution=32, flip=True, max_dropped=1.0, threads=2)


@pytest.fixture(scope='module')
def tokenizers():
    return Tokenizer.clip(), Tokenizer.clip('!')


def take(batches, n):
    got = [next(batches) for _ in range(n)]
    batches.close()
    return got


def same(a, b):
    return a.names == b.names and all(np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays)


@pytest.mark.parametrize(('height', 'width'), [(40, 70), (70, 40), (32, 32), (33, 90)])
@pytest.mark.parametrize('flip', [False, True])
def test_the_sizes_say_where_the_pixels_come_from(height, width, flip):
    """Cut by brute force out of the resized and, if so, flipped picture."""
    picture, target = noise(0, height, width), (24, 32)
    scale = max(24 / height, 32 / width)
    tall, wide = max(24, round(height * scale)), max(32, round(width * scale))
    resized = np.asarray(picture.resize((wide, tall), Image.Resampling.LANCZOS))
    whole = resized[:, ::-1] if flip else resized
    corners = set()
    for share in np.linspace(0, 0.999, 60):
        pixels, sizes = prepare(picture, (400, 700), target, Draw(share, 1 - share, flip, 0))
        top, left = sizes[2:4].astype(int)
        assert sizes.tolist() == [400, 700, top, left, 24, 32] and sizes.dtype == np.float32
        assert np.array_equal(pixels, whole[top : top + 24, left : left + 32])
        corners.add((top, left))
    assert {top for top, _ in corners} == {*range(tall - 24 + 1)}
    assert {left for _, left in corners} == {*range(wide - 32 + 1)}


def test_of_a_large_picture_only_the_cut_is_held():
    pixels, _ = prepare(noise(0, 40, 300), (40, 300), (32, 32), Draw(0.5, 0.5, True, 0))
    while isinstance(pixels.base, np.ndarray):
        pixels = pixels.base
    assert pixels.size == 32 * 32 * 3


@pytest.mark.parametrize(('height', 'width'), [(1, 17), (170, 10)])
def test_a_thin_picture_is_broken(height, width):
    drawn = Draw(0.5, 0.5, False, 0)
    with pytest.raises(Broken, match=f'too elongated.*{height} x {width}, to be cut to 32 x 32'):
        prepare(noise(0, height, width), (height, width), (32, 32), drawn)
    assert prepare(noise(0, 1, 16), (1, 16), (32, 32), drawn)[0].shape == (32, 32, 3)


def test_resizing_is_antialiased():
    """Of black and white lines of one pixel, a coarse picture is grey."""
    lines = Image.fromarray(np.tile(np.uint8([0, 255]), (256, 128))).convert('RGB')
    pixels, _ = prepare(lines, (256, 256), (64, 64), Draw(0.5, 0.5, False, 0))
    assert np.abs(pixels[:, 2:-2].astype(int) - 128).max() < 40


def test_draws():
    many = [draw(0, step, row, SETTINGS) for step in range(20) for row in range(20)]
    assert 140 < sum(d.flip for d in many) < 260
    assert draw(0, 3, 4, SETTINGS) == draw(0, 3, 4, SETTINGS) != draw(0, 4, 3, SETTINGS)
    center = draw(0, 3, 4, dataclasses.replace(SETTINGS, crop='center', flip=False))
    assert center[:3] == (0.5, 0.5, False)


def test_what_a_batch_holds(tmp_path, tokenizers):
    source = open_source(f'wds:{shard(tmp_path / "a.tar", 9, size=(40, 50))}', SETTINGS)
    batches = loader(source, tokenizers, SETTINGS, batch=4)
    arrays, names = next(batches)
    batches.close()
    _, ids = batches.order(0)
    assert names == [f'a.tar/{i:04d}' for i in ids]
    assert {k: (x.shape, str(x.dtype)) for k, x in arrays.items()} == {
        'row': ((4,), 'int32'),
        'pixels': ((4, 32, 32, 3), 'uint8'),
        'ids': ((4, 2, 77), 'int32'),
        'sizes': ((4, 6), 'float32'),
    }
    captions = [f'picture {i} of 0' for i in ids]
    for e, tokenizer in enumerate(tokenizers):
        assert np.array_equal(arrays['ids'][:, e], tokenizer(captions))
    for row, i in enumerate(ids):
        drawn = draw(0, 0, row, SETTINGS)
        pixels, sizes = prepare(noise((0, i), 40, 50), (40, 50), (32, 32), drawn)
        assert np.array_equal(arrays['pixels'][row], pixels)
        assert np.array_equal(arrays['sizes'][row], sizes)


def test_neither_start_nor_processes_nor_threads_matter(tmp_path, tokenizers):
    source = open_source(f'wds:{shard(tmp_path / "a.tar", 9, size=(40, 50))}', SETTINGS)

    def run(n, threads=2, **kw):
        settings = dataclasses.replace(SETTINGS, threads=threads)
        return take(loader(source, tokenizers, settings, batch=4, **kw), n)

    whole = run(6)
    assert not same(whole[0], whole[1])
    for a, b in zip(whole[3:], run(3, start=3), strict=True):
        assert same(a, b)
    for a, b in zip(whole, run(6, threads=1), strict=True):
        assert same(a, b)
    halves = [run(6, rows=rows) for rows in ([0, 1], [2, 3])]
    for a, *parts in zip(whole, *halves, strict=True):
        assert a.names == parts[0].names + parts[1].names
        for key, x in a.arrays.items():
            assert np.array_equal(x, np.concatenate([p.arrays[key] for p in parts]))


def test_worker_processes_change_nothing(tokenizers):
    source = open_source('synthetic:20', SETTINGS)
    with_workers = dataclasses.replace(SETTINGS, workers=2)
    here = take(loader(source, tokenizers, SETTINGS, batch=4, start=2), 5)
    there = take(loader(source, tokenizers, with_workers, batch=4, start=2), 5)
    for a, b in zip(here, there, strict=True):
        assert same(a, b)


def test_worker_processes_read_on_after_sigterm(tokenizers):
    """It goes to all processes of a job; the run ends them when it has saved."""
    source = open_source('synthetic:20', SETTINGS)
    batches = loader(source, tokenizers, dataclasses.replace(SETTINGS, workers=1), batch=4)
    next(batches)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert [len(next(batches).names) for _ in range(20)] == [4] * 20
    assert all(worker.is_alive() for worker in workers)
    batches.close()


ENDS_AT_ONCE = """
import dataclasses, multiprocessing, os
from lcm_jax.data.loader import loader
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source

settings = DataSettings(source='', resolution=16, threads=1, workers=1)
if __name__ == '__main__':
    batches = loader(open_source('synthetic:20', settings), (), settings, batch=4)
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os._exit(1)
"""


def test_worker_processes_end_with_a_run_that_ends_at_once(tmp_path):
    script, out = tmp_path / 'run.py', tmp_path / 'out'
    script.write_text(ENDS_AT_ONCE)
    env = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
    with open(out, 'w') as file:  # a pipe would stay open as long as the workers live
        done = subprocess.run([sys.executable, script], stdout=file, env=env)
    workers = [Path('/proc') / pid for pid in out.read_text().split()]
    assert done.returncode == 1 and workers
    end = time.monotonic() + 30
    while any(w.exists() and 'State:\tZ' not in (w / 'status').read_text() for w in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def broken_shard(file, bad, n=12):
    """A tar in which the pictures `bad` have a good header and end early."""
    members = []
    for i in range(n):
        picture = file_of(noise(i, 16, 16))
        members.append((f'{i}.png', picture[:400] if i in bad else picture))
        members.append((f'{i}.txt', b'x'))
    return tar_of(file, members)


def test_a_broken_picture_is_replaced_where_it_stood(tmp_path, tokenizers):
    """The other rows are those of a set without a fault, and each process finds the same."""
    names = {}
    for name, bad in (('good', ()), ('bad', (3, 5))):
        folder = tmp_path / name
        folder.mkdir()
        source = open_source(f'wds:{broken_shard(folder / "x.tar", bad)}', SETTINGS)
        names[name] = [b.names for b in take(loader(source, tokenizers, SETTINGS, batch=4), 6)]
    gone = {'x.tar/3', 'x.tar/5'}
    for good, bad in zip(names['good'], names['bad'], strict=True):
        assert not gone & {*bad}
        assert all(b == g or g in gone for g, b in zip(good, bad, strict=True))
    assert gone & {name for step in names['good'] for name in step}
    half = loader(source, tokenizers, SETTINGS, batch=4, rows=[2, 3])
    got = take(half, 6)
    assert [b.names for b in got] == [step[2:] for step in names['bad']]
    assert half.loaded == 12
    lost = sum(name in gone for step in names['good'] for name in step[2:])
    assert half.broken.counts == {'picture cannot be read': lost} and lost


def test_too_many_broken_pictures_stop_the_run(tmp_path, tokenizers):
    source = open_source(f'wds:{broken_shard(tmp_path / "x.tar", range(6))}', SETTINGS)
    strict = dataclasses.replace(SETTINGS, max_dropped=0.2)
    batches = loader(source, tokenizers, strict, batch=4)
    with pytest.raises(InputError, match=r'samples are broken, more than max_dropped = 0\.2') as e:
        take(batches, 50)
    assert 'picture cannot be read (first: x.tar/' in str(e.value)
    assert len(batches.broken) >= 10
    nothing = open_source(f'wds:{broken_shard(tmp_path / "y.tar", range(12))}', SETTINGS)
    with pytest.raises(InputError, match=r'100 broken samples one after the other: \d+ picture'):
        take(loader(nothing, tokenizers, SETTINGS, batch=4), 1)


def test_long_captions_are_cut_and_counted(tmp_path, tokenizers):
    texts = ['word ' * n for n in (1, 75, 76, 300)]
    members = [
        member
        for i, text in enumerate(texts)
        for member in ((f'{i}.png', encoded()), (f'{i}.txt', text.encode()))
    ]
    source = open_source(f'wds:{tar_of(tmp_path / "x.tar", members)}', SETTINGS)
    batches = loader(source, tokenizers, SETTINGS, batch=4)
    arrays, names = next(batches)
    batches.close()
    assert batches.cut.counts == {'longer than 77 tokens': 2} and batches.loaded == 4
    first = next(name for name in names if name in ('x.tar/2', 'x.tar/3'))
    assert [*batches.told()] == [f'captions cut, of 4: 2 longer than 77 tokens (first: {first})']
    assert (arrays['ids'][names.index('x.tar/3'), 0, -1]) == arrays['ids'][0, 0].max()


def test_one_of_several_captions_is_drawn(tmp_path, tokenizers):
    lines = b'{"file_name": "0.png", "text": ["a cat", "a dog", "a cow"]}'
    (tmp_path / 'metadata.jsonl').write_bytes(lines)
    (tmp_path / '0.png').write_bytes(encoded())
    source = open_source(f'folder:{tmp_path}', SETTINGS)
    got = take(loader(source, tokenizers[:1], SETTINGS, batch=1), 30)
    assert len({b.arrays['ids'].tobytes() for b in got}) == 3


def test_buckets(tokenizers):
    settings = dataclasses.replace(SETTINGS, buckets=True, resolution=64)
    source = open_source('synthetic:60', settings)
    found = groups(source, settings)
    assert sum(len(ids) for _, ids in found) == 60 and len(found) > 1
    table = shapes(64)
    for (h, w), ids in found:
        assert h * w <= 64 * 64 and h % 16 == w % 16 == 0
        for height, width in source.sizes[ids]:
            gaps = [abs(np.log(height / width * x / y)) for y, x in table]
            assert abs(np.log(height / width * w / h)) == pytest.approx(min(gaps))
    batches = loader(source, tokenizers, settings, batch=4)
    seen = set()
    for step, batch in enumerate(take(batches, 30)):
        bucket, ids = batches.order(step)
        shape = batches.shapes[bucket]
        assert batch.arrays['pixels'].shape == (4, *shape, 3)
        assert (batch.arrays['sizes'][:, 4:] == shape).all()
        assert batch.names == [source.sample_name(i) for i in ids]
        seen.add(shape)
    assert len(seen) > 1


def test_bucket_shapes_are_those_of_sdxl():
    table = shapes(1024)
    assert {(512, 2048), (576, 1792), (640, 1600), (832, 1216), (896, 1152), (1024, 1024)} <= {
        *table
    }
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 for h, w in table)
    assert all((w, h) in table for h, w in table)
    sizes = np.array([[100, 100], [100, 5000], [1536, 1000]])
    assert [table[i] for i in nearest(sizes, table)] == [(1024, 1024), (512, 2048), (1216, 832)]


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        *(
            ('resolution', 0),
            ('max_dropped', 1.5),
            ('seed', -1),
            ('threads', 0),
        ),
        *(('crop', 'middle'), ('workers', -1)),
    ],
)
def test_settings_out_of_range(key, value):
    with pytest.raises(InputError, match=key):
        DataSettings(**{key: value})


def test_emoji_load_at_their_own_size(tokenizers):
    settings = DataSettings(source='emoji-heldout:noto')
    source = open_source(settings.source, settings)
    arrays, names = take(loader(source, tokenizers[:1], settings, batch=2), 1)[0]
    i = [source.sample_name(j) for j in range(len(source))].index(names[0])
    stored = np.asarray(Image.open(io.BytesIO(source.read(i).picture)).convert('RGB'))
    assert np.array_equal(arrays['pixels'][0], stored)
    assert arrays['sizes'][0].tolist() == [64, 64, 0, 0, 64, 64]
