"""Accelerators: what each kind can do, and those of a topology that need not be here."""

import math
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from lcm_jax.errors import InputError, first_line

GIB = 2**30
HOST = [2, 2, 1]  # chips of a TPU host


class Chip(NamedTuple):
    """A device's peaks. Numbers are the makers' but for the memory, of which programs get less."""

    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second
    memory: float  # bytes, as the compiler says when a program needs more


# By the start of jax's `device_kind`; the longest that fits. GPUs are the SXM kind unless they say.
CHIPS = {
    'TPU v4': Chip(275e12, 1228e9, 30.75 * GIB),
    'TPU v5 lite': Chip(197e12, 819e9, 15.75 * GIB),  # v5e
    'TPU v5': Chip(459e12, 2765e9, 95.73 * GIB),  # v5p
    'TPU v6 lite': Chip(918e12, 1640e9, 31.24 * GIB),  # v6e
    'NVIDIA A100': Chip(312e12, 2039e9, 80 * GIB),
    'NVIDIA A100-SXM4-40GB': Chip(312e12, 1555e9, 40 * GIB),
    'NVIDIA A100-PCIE-40GB': Chip(312e12, 1555e9, 40 * GIB),
    'NVIDIA H100': Chip(989e12, 3350e9, 79 * GIB),
    'NVIDIA H100 PCIe': Chip(756e12, 2000e9, 79 * GIB),
    'NVIDIA H100 NVL': Chip(835e12, 3900e9, 93 * GIB),
    'NVIDIA H200': Chip(989e12, 4800e9, 140 * GIB),
}


def chip(device):
    """A device, here or not -> Chip; NaN for what is not known. Here, its own memory counts."""
    if device.platform == 'cpu':
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        return Chip(math.nan, math.nan, memory / device.client.device_count())
    kinds = [kind for kind in CHIPS if device.device_kind.startswith(kind)]
    found = CHIPS[max(kinds, key=len)] if kinds else Chip(*(math.nan,) * 3)
    try:
        stats = device.memory_stats() or {}
    except Exception:  # described, not here
        stats = {}
    return found._replace(memory=stats.get('bytes_limit', found.memory))


def devices_of(topology):
    """'v5e:4x4' (of several slices: '2*v5e:4x4') or 'local' -> devices. InputError for an unknown one."""
    if topology == 'local':
        return jax.devices()
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # there is no such machine to ask
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # it takes no TPU
    slices, _, name = topology.rpartition('*')
    options = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}  # a chip a device
    sides = [int(n) for n in name.partition(':')[2].split('x') if n.isdigit()]
    host = [min(pair) for pair in zip((*sides, 1), HOST, strict=False)]
    if host != HOST:  # the compiler wants to be told of a smaller one
        options['chips_per_host_bounds'] = host
    try:
        described = topologies.get_topology_desc(
            platform='tpu', topology_name=name, num_slices=int(slices or 1), **options
        )
    except Exception as e:  # of several kinds, by what is wrong
        raise InputError(
            f'topology {topology!r}: {first_line(e)}; '
            "give 'local', or one such as v5e:4x4, v5p:2x2x2, v6e:4x4 or 2*v5e:16x16, "
            'with jax[tpu] installed'
        ) from e
    return described.devices
