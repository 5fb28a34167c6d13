"""Several processes that run one program: how they find each other, and what they tell each other."""

import json
import os

import jax
import numpy as np

from lcm_jax.errors import InputError
from lcm_jax.peers import meet

# Where several processes run one program: (name, whether the environment variables say so).
CLUSTERS = (
    ('JAX', lambda env: 'JAX_COORDINATOR_ADDRESS' in env),
    ('TPU slices', lambda env: 'MEGASCALE_COORDINATOR_ADDRESS' in env),
    ('TPU hosts', lambda env: len(_hosts(env.get('TPU_WORKER_HOSTNAMES', ''))) > 1),
    ('Slurm', lambda env: int(env.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_STEP_NODELIST' in env),
    ('Open MPI', lambda env: int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1),
)


def _hosts(text):
    return [] if ' ' in text else [host for host in text.split(',') if host]


def cluster(environment=None):
    """The name in CLUSTERS of what the environment describes, or None."""
    environment = os.environ if environment is None else environment
    return next((name for name, found in CLUSTERS if found(environment)), None)


def start_distributed(coordinator=None, processes=None, process=None):
    """Join the other processes, if there are any; once, before any device is used.

    coordinator 'host:port' with the number of processes and this one's index, all three or none.
    Without them the environment decides (CLUSTERS), and JAX finds the rest. coordinator 'auto': ask
    JAX even though the environment is silent, as on Cloud TPU pods, which a metadata server describes.
    """
    if jax.distributed.is_initialized():
        return
    given = coordinator, processes, process
    if coordinator == 'auto' or (given == (None,) * 3 and cluster()):
        jax.distributed.initialize()
    elif given != (None,) * 3:
        if None in given or not 0 <= process < processes:
            raise InputError(
                f'coordinator {coordinator!r}, processes {processes}, process {process}: give all '
                'three, with process from 0 to processes - 1'
            )
        jax.distributed.initialize(coordinator, processes, process)
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f'{jax.process_count()} processes that have not joined: add --coordinator=auto'
        )


def gathered(blob):
    """Bytes of this process -> [bytes] of all, in each of them."""
    if jax.process_count() == 1:
        return [blob]
    from jax.experimental import multihost_utils

    meet('gathered')
    sizes = multihost_utils.process_allgather(np.array(len(blob))).tolist()
    padded = np.zeros(max(*sizes, 1), np.uint8)
    padded[: len(blob)] = np.frombuffer(blob, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:n].tobytes() for row, n in zip(rows, sizes, strict=True)]


def anywhere(flag):
    """Whether it holds in any process; the same answer in all of them."""
    return any(gathered(b'1' if flag else b''))


def alike(what, said):
    """InputError, in all processes, unless they say the same of `what`.

    said: {name: value, as JSON has it}, of this process.
    """
    told = [json.loads(blob) for blob in gathered(json.dumps(said).encode())]
    lines = []
    for name in dict.fromkeys(name for one in told for name in one):
        groups = {}
        for process, one in enumerate(told):
            groups.setdefault(repr(one.get(name)), []).append(process)
        if len(groups) > 1:
            lines.append(f'{name} = ' + ', '.join(f'{x} {_in(ids)}' for x, ids in groups.items()))
    if lines:
        raise InputError(
            f'{what}: not the same in all processes: {"; ".join(lines[:3])}; start all of them with '
            'the same settings, model and data'
        )


def _in(processes, most=4):
    """[number of a process] -> 'in process 3', 'in processes 0, 1, 2, 4 and 11 more'."""
    more = f' and {len(processes) - most} more' if len(processes) > most else ''
    return f'in process{"es" * (len(processes) > 1)} {", ".join(map(str, processes[:most]))}{more}'
