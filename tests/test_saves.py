"""Checkpoints that are damaged, and runs that go on with other settings; without training."""

import os
import re
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax import loop, sharding
from lcm_jax.errors import InputError
from lcm_jax.peers import Peers
from lcm_jax.saves import Saves

HOME = jax.sharding.SingleDeviceSharding(jax.devices()[0])
RECIPE = {'train': {'steps': 3, 'lr': 1.0, 'decay': False}}


def state(step):
    rng = np.random.default_rng(step)
    params = {f'{n}/kernel': rng.standard_normal((n, n), np.float32) for n in (3, 64, 300)}
    return loop.init(params, optax.adam(1e-3), 0.9)._replace(step=jnp.int32(step))


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=HOME), state(0))


def saves(folder, **changes):
    return Saves(folder, {'train': RECIPE['train'] | changes}, best='distance')


def restored(folder, **changes):
    """-> the step whose state is restored, to the bit, or None."""
    with saves(folder, **changes) as kept:
        got = kept.restore(ABSTRACT)
    if got is not None:
        jax.tree.map(np.testing.assert_array_equal, got, state(int(got.step)))
        return int(got.step)
    return None


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp('two') / 'checkpoints'
    with saves(folder) as kept:
        for step in (1, 2):
            kept.save(step, state(step), {'distance': 1 / step})
    return folder


def test_a_folder_where_none_can_be_renamed_is_refused(tmp_path, monkeypatch):
    def rename(self, target):
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr('pathlib.Path.rename', rename)
    with pytest.raises(InputError, match=r'Too many open files\); a bucket must be mounted'):
        saves(tmp_path / 'checkpoints')


@pytest.fixture
def folder(two, tmp_path):
    return shutil.copytree(two, tmp_path / 'checkpoints')


def gone(file):
    file.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ('name', 'damage', 'said'),
    [
        ('commit_success.txt', gone, 'commit_success.txt is missing'),
        ('state/commit_success.txt', gone, 'state/commit_success.txt is missing'),
        ('recipe', shutil.rmtree, 'recipe/commit_success.txt is missing'),
        ('recipe/metadata', gone, 'recipe/metadata is missing'),
        ('recipe/metadata', cut, 'recipe/metadata is not JSON'),
        ('metrics/metrics', cut, 'metrics/metrics is not JSON'),
        ('_CHECKPOINT_METADATA', cut, '_CHECKPOINT_METADATA is not JSON'),
        ('state/_METADATA', gone, 'state/_METADATA is missing'),
        ('state/manifest.ocdbt', gone, 'the index of state: '),
        ('state/manifest.ocdbt', cut, 'the index of state: '),
        ('state/d/*', cut, 'the index of state: '),
        ('state/ocdbt.process_0', shutil.rmtree, r'state/ocdbt\S+ has 0 bytes of \d+'),
        ('state/ocdbt.process_0/d/*', gone, r'state/ocdbt\S+ has 0 bytes of \d+'),
        ('state/ocdbt.process_0/d/*', cut, r'state/ocdbt\S+ has \d+ bytes of \d+'),
    ],
)
def test_a_damaged_checkpoint_is_left_out(folder, capsys, name, damage, said):
    """Named in one line; the older one is gone on from, and later ones are kept as ever."""
    for file in (folder / '2').glob(name):
        damage(file)
    assert restored(folder) == 1
    assert re.fullmatch(f'.*/2 is damaged: {said}.*; it is left out, .*\n', capsys.readouterr().out)
    with saves(folder) as kept:
        kept.save(2, state(2), {'distance': 0.5})
    assert restored(folder) == 2
    assert capsys.readouterr().out == ''


def test_each_array_file_counts(folder):
    """Whichever is empty: what is restored is whole (some are indices that others have replaced)."""
    found = set()
    for file in (*folder.glob('2/state/d/*'), *folder.glob('2/state/ocdbt.process_0/d/*')):
        whole = file.read_bytes()
        file.write_bytes(b'')
        found.add(restored(shutil.copytree(folder, folder.with_name(file.name))))
        file.write_bytes(whole)
    assert 1 in found and found <= {1, 2}


def test_an_older_one_that_is_damaged(folder, capsys):
    """Such as one whose deletion was interrupted."""
    (folder / '1' / 'metrics' / 'metrics').write_text('{')
    assert restored(folder) == 2
    assert '/1 is damaged: metrics/metrics is not JSON' in capsys.readouterr().out


def test_no_whole_checkpoint_is_an_error(folder):
    for file in folder.glob('*/commit_success.txt'):
        file.unlink()
    before = sorted(folder.rglob('*'))
    with pytest.raises(InputError, match=r'2 cannot be restored: commit_success\.txt is missing'):
        restored(folder)
    assert sorted(folder.rglob('*')) == before


def test_an_array_that_cannot_be_read_is_an_error(folder):
    """What only reading finds, here bytes that are no compressed array: nothing is half loaded."""
    for file in (folder / '2' / 'state' / 'ocdbt.process_0' / 'd').iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(InputError, match='checkpoints/2 cannot be restored'):
        restored(folder)


def test_with_decay_the_number_of_steps_stays(tmp_path):
    folder = tmp_path / 'checkpoints'
    with saves(folder, decay=True) as kept:
        kept.save(1, state(1), {})
    assert restored(folder, decay=True) == 1
    for steps in (2, 4):
        with pytest.raises(
            InputError,
            match=rf'holds a run with train\.steps = 3 \(now {steps}\), from which train\.decay '
            'takes the rates; go on with its settings, or give another workdir',
        ):
            restored(folder, decay=True, steps=steps)
    with pytest.raises(InputError, match=r'train\.decay = True \(now False\)'):
        restored(folder, steps=4)


def test_without_decay_it_may_change(folder):
    for steps in (2, 4):
        assert restored(folder, steps=steps) == 2


def test_what_a_checkpoint_does_not_say_of_weights_and_samples_may_be_anything(folder):
    with Saves(folder, RECIPE | {'weights': {'vae': 'a'}, 'samples': {'number': 3}}) as kept:
        assert int(kept.restore(ABSTRACT).step) == 2
        kept.save(3, state(3), {})
    said = r"weights\.vae = 'a' \(now 'b'\), samples\.number = 3 \(now 4\)"
    with pytest.raises(InputError, match=said):
        Saves(folder, RECIPE | {'weights': {'vae': 'b'}, 'samples': {'number': 4}})


NEW = RECIPE | {'preview': {'prompts': ('a cat',)}}


def steps(folder):
    return sorted(int(p.name) for p in folder.iterdir())


def test_the_best_is_of_pictures_that_were_drawn_alike(folder):
    """A checkpoint whose pictures were drawn otherwise is no longer kept as the best."""
    with saves(folder) as kept:
        assert kept.best == 0.5
    with Saves(folder, NEW, best='distance') as kept:
        assert kept.best == np.inf
        for step, distance in ((3, 0.8), (4, 0.9), (5, 0.9), (6, 0.9)):
            assert kept.improves({'distance': distance}) == (step == 3)
            kept.save(step, state(step), {'distance': distance})
    assert steps(folder) == [3, 5, 6]
    with Saves(folder, NEW, best='distance') as kept:
        assert kept.best == 0.8


@pytest.mark.parametrize('metric', ['distance', 'validation'])
def test_the_best_is_of_the_weights_that_are_exported(tmp_path, metric):
    """Metrics are kept without a best, too: it may be asked for later."""
    for weights, best, found in (
        ('params', metric, np.inf),
        ('params', '', np.inf),
        ('params', metric, 0.5),
        ('ema', metric, np.inf),
    ):
        with Saves(tmp_path, RECIPE | {'export': {'weights': weights}}, best=best) as kept:
            assert kept.best == found
            step = (kept.step or 0) + 1
            kept.save(step, state(step), {metric: 0.5 if best else 0.7})


def test_a_loss_does_not_depend_on_the_pictures(tmp_path):
    for recipe in (RECIPE, NEW):
        with Saves(tmp_path, recipe, keep=1, best='validation') as kept:
            for step in (1, 2) if recipe is RECIPE else (3, 4):
                kept.save(step, state(step), {'validation': step})
    assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize(
    ('change', 'again'),
    [
        ({'train': RECIPE['train'] | {'best': 'distance'}}, np.inf),  # another's file is there
        ({'data': {'validation': 'folder:b', 'validation_batches': 4}}, np.inf),
        ({'preview': {'prompts': ('a cat',)}}, 0.5),
    ],
)
def test_a_loss_is_compared_with_those_of_the_same_samples(tmp_path, change, again):
    """Which may be other ones when a run goes on."""
    recipe = {
        'train': RECIPE['train'] | {'best': 'validation'},
        'data': {'validation': 'folder:a', 'validation_batches': 4},
        'preview': {'prompts': ('a dog',)},
    }
    with Saves(tmp_path, recipe, best='validation') as kept:
        kept.save(1, state(1), {'validation': 0.5})
    with Saves(tmp_path, recipe | change, best='validation') as kept:
        assert kept.step == 1 and kept.best == again


def test_none_is_the_best_without_a_metric(tmp_path):
    with Saves(tmp_path, RECIPE, keep=1, best='distance') as kept:
        for step, metrics in enumerate(({}, {'distance': np.nan}, {'distance': 1.0}, {}, {})):
            kept.save(step, state(step), metrics)
    assert steps(tmp_path) == [2, 4]


def trained(saves, on_save, place=lambda x: x):
    """Steps 6 to 9 of a run, saved after 7 and 9."""

    def step(state, frozen, batch, key):
        return state._replace(step=state.step + 1), {'loss': 0.0, 'grad_norm': 0.0, 'finite': True}

    loop.fit(
        step, jax.tree.map(place, state(0)._replace(step=jnp.int32(5))), None,
        lambda i: iter([(None, ['a'])] * 4), None, steps=9, saves=saves, log=print, save_every=7,
        log_every=9, on_save=on_save,
    )  # fmt: skip


def full(*_):
    raise OSError('disk full')


@pytest.mark.parametrize('on_save', [full, lambda i, state: ({'distance': 0.5}, full)])
def test_an_error_in_a_preview_loses_no_steps(tmp_path, on_save):
    """Drawn or written; it does not count as a best one."""
    folder = tmp_path / 'checkpoints'
    with pytest.raises(OSError, match='disk full'), saves(folder) as kept:
        trained(kept, on_save)
    with saves(folder) as kept:
        assert int(kept.restore(ABSTRACT).step) == 7 and kept.best == np.inf


def test_what_others_do_not_come_to_save_is_not_waited_for(tmp_path, monkeypatch):
    """They wait in what the process that failed has left."""
    monkeypatch.setattr(loop, 'all_come', lambda name: False)
    with pytest.raises(OSError, match='disk full'), saves(tmp_path / 'checkpoints') as kept:
        trained(kept, full)
    with saves(tmp_path / 'checkpoints') as kept:
        assert kept.step is None


SECOND = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import test_saves
test_saves.process(sys.argv[3])
"""


def process(folder):
    """One of two, of which the first cannot write its pictures."""
    home = sharding.replicated(sharding.make_mesh())
    mine = loop.nothing if jax.process_index() else lambda i, state: ({}, full)
    with Peers(), saves(folder) as kept:
        trained(kept, mine, lambda x: sharding.put(x, home))


def test_an_error_in_one_of_two_processes_loses_no_steps(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{s.getsockname()[1]}'
    command = [sys.executable, '-c', SECOND, address]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(sys.path)}
    pair = [
        subprocess.Popen([*command, str(i), tmp_path], env=env, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [p.communicate(timeout=300)[1] for p in pair]
    assert [p.returncode for p in pair] == [1, 1], said
    assert said[1].endswith('error: OSError: disk full (in process 0; this is 1)\n')
    with saves(tmp_path) as kept:
        assert int(kept.restore(ABSTRACT).step) == 7
