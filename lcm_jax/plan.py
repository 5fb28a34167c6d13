"""What a program asks of accelerators that are not here: compiled for them ahead of time.

TPUs need `jax[tpu]` installed and nothing more; without one, set JAX_PLATFORMS=cpu.
"""

import math
import re
import time
from typing import NamedTuple

import jax

from lcm_jax import hlo
from lcm_jax.chips import GIB, Chip, chip
from lcm_jax.errors import InputError
from lcm_jax.flops import flops


class Program(NamedTuple):
    """A function with abstract arguments that say where they lie on a mesh."""

    fn: callable
    args: dict  # by kind, in the order that fn takes them
    mesh: jax.sharding.Mesh
    samples: int  # that one call works on
    donated: tuple[str, ...] = ()  # kinds whose memory the results take
    out: object = None  # shardings of the result


class Cost(NamedTuple):
    """Of one device, as the compiler counts: a custom kernel's operands only."""

    seconds: float  # to compile
    flops: float  # a loop's body counts once
    bytes_accessed: float
    temporaries: int  # bytes
    arguments: int  # bytes
    results: int  # bytes, beyond those that take the arguments' place
    code: int  # bytes
    hlo: str

    @property
    def peak(self):
        """Bytes that the program needs."""
        return self.temporaries + self.arguments + self.results + self.code


class TooLarge(InputError):
    """The compiler's word that a program does not fit; `needed` and `memory` are bytes or NaN."""

    def __init__(self, text):
        numbers = re.findall(
            r'[Uu]sed (\d[\d.]*)([KMGT]) of (\d[\d.]*)([KMGT])', text
        ) or re.findall(
            r'\((\d[\d.]*)([KMGT])\) exceeds available \w+ \((\d[\d.]*)([KMGT])\)', text
        )
        units = dict(zip('KMGT', (2**10, 2**20, GIB, 2**40), strict=True))
        a, b, c, d = numbers[0] if numbers else ('nan', 'G', 'nan', 'G')
        self.needed, self.memory = float(a) * units[b], float(c) * units[d]
        super().__init__(text.splitlines()[0])


def compiled(program):
    """Program -> Cost. Raises TooLarge where the compiler finds that it does not fit."""
    donated = tuple(i for i, kind in enumerate(program.args) if kind in program.donated)
    jitted = jax.jit(program.fn, donate_argnums=donated, out_shardings=program.out)
    lowered = jitted.lower(*program.args.values())
    start = time.perf_counter()
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        raise TooLarge(str(e)) from e
    seconds = time.perf_counter() - start
    cost, memory, text = done.cost_analysis(), done.memory_analysis(), done.as_text()
    return Cost(
        seconds,
        cost.get('flops', math.nan),
        cost.get('bytes accessed', math.nan) + hlo.looped(text),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        text,
    )


class Report(NamedTuple):
    """What a program asks of one device, and what the device has."""

    chip: Chip
    devices: int
    samples: int  # of one call, on all devices
    memory: dict[str, float]  # bytes by kind
    needed: float  # bytes; the compiler's word where it refused
    flops: float  # products and convolutions
    cost: Cost | None  # None: the compiler refused
    collectives: list

    @property
    def spare(self):
        """Bytes left; negative: the program does not fit."""
        return self.chip.memory - self.needed

    @property
    def seconds(self):
        """The least a call can take: of its arithmetic and of its memory's traffic."""
        return self.flops / self.chip.flops, self.cost.bytes_accessed / self.chip.bandwidth


def report(program):
    """Compile a Program -> Report."""
    mesh, n = program.mesh, program.mesh.devices.size
    device = mesh.devices.flat[0]
    own, memory = chip(device), {kind: held(tree) for kind, tree in program.args.items()}
    work = flops(program.fn, *program.args.values(), platform=device.platform) / n
    memory = {kind: size for kind, size in memory.items() if size}
    common = n, program.samples
    try:
        cost = compiled(program)
    except TooLarge as e:
        own = own if math.isnan(e.memory) else own._replace(memory=e.memory)
        return Report(own, *common, memory, e.needed, work, None, [])
    memory |= {
        'layout': max(0, cost.arguments - sum(memory.values())),
        'results': cost.results,
        'temporaries': cost.temporaries,
        'code': cost.code,
    }
    sent = hlo.collectives(cost.hlo, dict(mesh.shape))
    return Report(own, *common, memory, cost.peak, work, cost, sent)


def held(tree):
    """Bytes of abstract arrays with shardings on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
