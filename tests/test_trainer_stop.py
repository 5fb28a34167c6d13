"""Runs that are killed go on as if nothing had been: trainer_tables.py kills more often."""

import random
import re
import signal
import time

import pytest
import runs

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # ml_collections' own
    pytest.mark.usefixtures('quick_compiler'),
]
LONG = {'train.steps': 24, 'train.save_every': 3}


def equal(whole, run, steps=LONG['train.steps']):
    """To the bit: state, exported files; each step is reported once."""
    runs.same(runs.state(whole), runs.state(run))
    for name in ('lora', 'lora_best'):
        runs.same(runs.exported(whole, name), runs.exported(run, name))
    assert runs.losses(whole) == runs.losses(run)
    assert sorted(runs.losses(run)) == [*range(1, steps + 1)]


def writing(run):
    """Whether a checkpoint is being written."""
    return bool(runs.checkpoints(run)[1])


def test_killed_while_it_saves_and_while_it_trains_then_stopped(model, tmp_path):
    """SIGKILL twice, then SIGTERM, which saves and ends with 143; compared with a run in one go."""
    run, whole = tmp_path / 'run', tmp_path / 'whole'
    process = runs.start(model, run, LONG)
    assert runs.until(lambda: writing(run), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process = runs.start(model, run, LONG)
    assert runs.until(lambda: runs.checkpoints(run)[0], process)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = runs.checkpoints(run)[0][-1]
    process = runs.start(model, run, LONG)
    assert runs.until(lambda: runs.checkpoints(run)[0][-1] > before, process)
    process.send_signal(signal.SIGTERM)
    (said,) = runs.finish(process, status=143)
    assert 'stopped by SIGTERM, saved at step' in said and 'Traceback' not in said
    assert 0 < runs.first_step(said) <= before
    saved = runs.checkpoints(run)[0][-1]
    assert f'saved at step {saved};' in said and not writing(run)
    (said,) = runs.finish(runs.start(model, run, LONG))
    assert runs.first_step(said) == saved
    settings = {key.replace('.', '__'): value for key, value in LONG.items()}
    runs.run(model, whole, **settings)
    equal(whole, run)


@pytest.mark.full  # minutes, and waits that a busy machine can outlast
def test_one_of_two_processes_is_killed_or_stopped(model, tmp_path):
    """The other one ends too, and says why; both go on from the last checkpoint."""
    run, whole, settings = tmp_path / 'run', tmp_path / 'whole', LONG | {'train.steps': 100_000}
    for victim, other in ((1, 0), (0, 1)):  # process 0 runs the service by which they meet
        before = runs.checkpoints(run)[0]
        processes = runs.start_several(model, run, settings, devices=1, lost=5.0)
        read = len(processes[other].log.read_text())
        assert runs.until(lambda before=before: runs.checkpoints(run)[0] != before, *processes)
        processes[victim].send_signal(signal.SIGKILL)
        assert processes[victim].wait() == -signal.SIGKILL
        said = runs.finish(processes[other], timeout=50, status=1)[0][read:]
        assert re.findall('error: .*', said) == [said.strip().splitlines()[-1]]
        silent = f'no sign of process {victim} for 5 s'
        assert re.search(f'error: ({silent}|another process is gone|process 0 is gone)', said)
        assert 'start all processes again' in said and 'Traceback' not in said

    def resumed():
        return processes[0].log.read_text().count('going on from')

    before = resumed()
    processes = runs.start_several(model, run, settings, devices=1)
    assert runs.until(lambda: resumed() > before, *processes)
    processes[1].send_signal(signal.SIGTERM)  # a few seconds until they agree on a step
    said = runs.finish(*processes, status=143)
    assert 'stopped by SIGTERM' in said[0] and 'Traceback' not in said[1]
    settings['train.steps'] = runs.checkpoints(run)[0][-1] + 4
    for workdir in (run, whole):
        runs.finish(*runs.start_several(model, workdir, settings, devices=1))
    equal(whole, run, settings['train.steps'])
