"""The same run on other devices: trainer_tables.py prints the larger table."""

import pytest
import runs
from sets import encoded
from trainer_tables import MESH

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # ml_collections' own
    pytest.mark.usefixtures('quick_compiler'),
]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Of two levels, so that what changes the size of pictures is divided as well."""
    return runs.write_tiny(tmp_path_factory.mktemp('model') / 'tiny', **runs.LEVELS)


@pytest.fixture(scope='module')
def alone(model, tmp_path_factory):
    """The workdir of a run on one device, in this process."""
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    runs.run(model, workdir)
    return workdir


def close(a, b, loss=1e-4, params=2e-2):
    """Two workdirs: float32 rounding apart. Adam turns the smallest gradients' signs into steps."""
    a_losses, b_losses = runs.losses(a), runs.losses(b)
    assert [*a_losses] == [*b_losses] == [*range(1, 7)]
    assert runs.difference(a_losses, b_losses) < loss
    assert runs.difference(runs.exported(a), runs.exported(b)) < params


def test_a_run_goes_on_on_other_devices(model, alone, tmp_path):
    """Two processes of four devices, each of which reads its part of the batch, then 1 device, then 4.

    With what may change: the cut of the batch and of the backward pass, and where arrays lie.
    """
    run = tmp_path / 'run'
    settings = MESH | {'train.steps': 3, 'train.save_every': 3}
    settings |= {'mesh.rules': (('frozen/null/.*', (None, 'tensor')),)}
    said = runs.finish(*runs.start_several(model, run, settings))
    assert 'mesh data 2 x fsdp 2 x tensor 2: 8 cpu, 2 processes' in said[0]
    assert 'mesh data' not in said[1]  # only the first one speaks
    runs.run(model, run, train__steps=5, train__accumulate=2, train__remat='blocks')
    said = runs.finish(runs.start(model, run, {'mesh.fsdp': 2}, 4))
    assert runs.first_step(said[0]) == 5
    close(alone, run)


def test_from_the_cache_as_from_pixels(model, alone, tmp_path):
    """By two processes, each of which encodes its part."""
    settings = {'data.cache': True, 'train.save_every': 6}
    processes = runs.start_several(model, tmp_path / 'run', settings, devices=1)
    runs.finish(*processes)
    assert len([*(tmp_path / 'run' / 'cache').glob('part-*-of-00002.json')]) == 2
    close(alone, tmp_path / 'run')


def test_an_error_in_one_process_ends_all(model, tmp_path):
    """Process 1 finds its pictures cut short, while process 0 waits for it in the first step.

    Then it lacks one: the two would train on different samples.
    """
    folders = tmp_path / 'good', tmp_path / 'bad'
    for folder, length in zip(folders, (None, 60), strict=True):
        (folder / 'set').mkdir(parents=True)
        for i in range(8):
            (folder / 'set' / f'{i}.png').write_bytes(encoded(size=(40, 40))[:length])
            (folder / 'set' / f'{i}.txt').write_text('a picture')

    def end(workdir):
        processes = runs.start_several(
            model, workdir, {'data.source': 'folder:set'}, devices=1, folders=folders
        )
        return runs.finish(*processes, status=1)

    good, bad = end(tmp_path / 'run')
    error = 'error: folder:set: 100 broken samples one after the other'
    assert error in bad and 'Traceback' not in bad
    assert error in good and '(in process 1; this is 0)' in good and 'Traceback' not in good
    (folders[1] / 'set' / '7.png').unlink()
    for said in end(tmp_path / 'other'):
        error = (
            'data.source folder:set: not the same in all processes: number = 8 in process 0, 7 in'
        )
        assert error in said and 'Traceback' not in said
