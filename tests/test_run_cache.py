"""The cache that a run makes of its data: filled once, and used for nothing else."""

import functools
import os
import time

import pytest
import runs
from sets import encoded, shard

from lcm_jax import feed, sharding
from lcm_jax.errors import InputError
from lcm_jax.model import describe

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # ml_collections' own
    pytest.mark.usefixtures('quick_compiler'),
]


@pytest.mark.parametrize(
    'files',
    [
        ('part-00000-of-00001.array_record',),
        ('part-00001-of-00002.json', 'part-00001-of-00002.npz'),
    ],
    ids=['one process', 'two'],
)
def test_a_cache_that_was_interrupted_is_filled_again(model, filled, tmp_path, files):
    """Of one process or of several: what counts is that all parts are there."""
    folder = tmp_path / 'cache'
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(b'{}')
    runs.fill(model, tmp_path)
    there, whole = (
        {p.name: p.read_bytes() for p in f.iterdir()} for f in (folder, filled / 'cache')
    )
    assert there == whole
    parts = {name.split('.')[0] for name in there if name.startswith('part-')}
    assert parts == {'part-00000-of-00001'}


def test_a_cache_of_something_else_is_refused(model, filled, uncompiled):
    for changes, said in (
        ({'data__resolution': 20}, 'data.resolution = 20: must be a multiple of 8'),
        ({'data__source': 'synthetic:41'}, "source = 'synthetic:40' .now 'synthetic:41'"),
        ({'data__flip': True}, 'data.flip = False .now True'),
        (
            {'data__source': f'cache:{filled}/cache', 'data__min_size': 9},
            '/cache was encoded with data.min_size = 0; this run has 9: make the cache again',
        ),
        (
            {'data__source': f'cache:{filled}/cache', 'dtype': 'bfloat16'},
            "/cache: its context is float32; this run has dtype = 'bfloat16': .* --dtype bfloat16, or",
        ),
    ):
        with pytest.raises(InputError, match=said):
            runs.run(model, filled, data__cache=True, **changes)


def test_pictures_to_validate_a_run_from_a_cache_are_refused(model, filled, tmp_path, uncompiled):
    settings = {'data__source': f'cache:{filled}/cache', 'data__validation': 'synthetic:9'}
    with pytest.raises(InputError, match='synthetic:9 is no cache, but'):
        runs.run(model, tmp_path / 'run', **settings)


def fed(model, workdir, source):
    """How many samples a run is fed from the cache of a source."""
    config = runs.config(model, {'data.cache': True, 'data.source': source})
    opened = feed.Feed(describe(str(model)), config, sharding.make_mesh(), workdir)
    opened.close()
    return len(opened.source)


def test_a_cache_of_tars_that_have_changed_is_named(model, tmp_path, capsys, monkeypatch):
    """Of the same sizes, as a caption was mended; here behind a link."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    file, source = tmp_path / 'there.tar', f'wds:{tmp_path}/x.tar'
    shard(file, 9)
    (tmp_path / 'x.tar').symlink_to(file)
    said = 'are others than when'
    for later, is_said in ((0, False), (0, False), (9, True), (9, True)):
        os.utime(file, (time.time(), 1e9 + later))
        assert fed(model, tmp_path / 'run', source) == 9
        assert (said in capsys.readouterr().out) == is_said


def test_a_cache_of_other_samples_is_refused(model, tmp_path, capsys):
    """Of a source of the same name; one that is gone is not missed."""
    pictures, workdir = tmp_path / 'pictures', tmp_path / 'run'
    pictures.mkdir()
    for i in range(9):
        (pictures / f'{i}.png').write_bytes(encoded(size=(16, 16)))
        (pictures / f'{i}.txt').write_text('a disc')
    (tmp_path / '3.txt').write_text('a disc')
    (pictures / '3.txt').unlink()
    (pictures / '3.txt').symlink_to(tmp_path / '3.txt')
    again = functools.partial(fed, model, workdir, f'folder:{pictures}')
    assert again() == again() == 9
    assert 'are others' not in capsys.readouterr().out
    (tmp_path / '3.txt').write_text('a dish')
    later = time.time() + 9
    os.utime(tmp_path / '3.txt', (later, later))
    assert again() == 9 and 'are others than when' in capsys.readouterr().out
    aside = pictures.rename(tmp_path / 'aside')
    assert again() == 9 and 'its cache is used as it is' in capsys.readouterr().out
    aside.rename(pictures)
    (pictures / '8.png').unlink()
    with pytest.raises(InputError, match=r'cache was made with samples\.number = 9 \(now 8\)'):
        again()


def test_a_cache_of_other_encoders_is_refused(model, filled, uncompiled):
    """As `lcm-jax data cache` writes it, too: named as a source."""
    with (
        runs.other_weights(model, 'vae'),
        pytest.raises(InputError, match='other weights of vae than'),
    ):
        runs.run(model, filled / 'new', data__source=f'cache:{filled}/cache')


@pytest.mark.parametrize('part', ['vae', 'text_encoder'])
def test_a_cache_of_other_weights_is_refused(model, filled, uncompiled, part):
    said = rf"was made with weights\.{part} = '\w+' \(now '\w+'\)"
    with runs.other_weights(model, part), pytest.raises(InputError, match=said):
        runs.run(model, filled, data__cache=True)
