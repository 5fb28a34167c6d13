"""How processes find each other, and what must be alike in all of them."""

import json

import jax
import pytest

from lcm_jax import processes
from lcm_jax.errors import InputError


@pytest.mark.parametrize(
    ('environment', 'name'),
    [
        ({}, None),
        ({'SLURM_NTASKS': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'WARNING: could not determine, please set it'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'TPU hosts'),
        ({'MEGASCALE_COORDINATOR_ADDRESS': 'a'}, 'TPU slices'),
        ({'SLURM_NTASKS': '2'}, None),  # a shell of sbatch or salloc
        ({'SLURM_NTASKS': '2', 'SLURM_STEP_NODELIST': 'n[1-2]'}, 'Slurm'),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, 'Open MPI'),
    ],
)
def test_clusters(environment, name):
    assert processes.cluster(environment) == name


def test_start_distributed(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *args: calls.append(args))
    monkeypatch.setattr(processes, 'cluster', lambda: None)
    processes.start_distributed()
    assert not calls
    for given in (('a:1', 2, None), ('a:1', 2, 2), (None, 2, 0)):
        with pytest.raises(InputError):
            processes.start_distributed(*given)
    processes.start_distributed('a:1', 2, 1)
    processes.start_distributed('auto')
    monkeypatch.setattr(processes, 'cluster', lambda: 'Slurm')
    processes.start_distributed()
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
    processes.start_distributed()
    assert calls == [('a:1', 2, 1), (), ()]


def test_processes_that_have_not_joined(monkeypatch):
    """As on a TPU pod, whose hosts JAX sees without being asked."""
    monkeypatch.setattr(processes, 'cluster', lambda: None)
    monkeypatch.setattr(jax, 'process_count', lambda: 4)
    with pytest.raises(
        InputError, match='4 processes that have not joined: add --coordinator=auto'
    ):
        processes.start_distributed()


def test_what_all_processes_must_have_alike(monkeypatch):
    def others(*said):
        rows = [json.dumps(x).encode() for x in said]
        monkeypatch.setattr(processes, 'gathered', lambda blob: [blob, *rows])

    mine = {'train.lr': 0.1, 'data.seed': 0, 'preview.prompts': ('a', 'b')}
    others(mine, mine)
    processes.alike('settings', mine)
    others(mine, mine | {'data.seed': 1}, mine, *5 * [mine | {'train.lr': 0.2}])
    with pytest.raises(InputError) as e:
        processes.alike('settings', mine)
    assert str(e.value).startswith(
        'settings: not the same in all processes: '
        'train.lr = 0.1 in processes 0, 1, 2, 3, 0.2 in processes 4, 5, 6, 7 and 1 more; '
        'data.seed = 0 in processes 0, 1, 3, 4 and 4 more, 1 in process 2; start all'
    )
    others({'data.seed': 0})
    with pytest.raises(
        InputError, match=r'train\.lr = 0\.1 in process 0, None in process 1; preview'
    ):
        processes.alike('settings', mine)
