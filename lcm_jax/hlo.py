"""Reading the compiler's text: what devices send each other, and arrays that should not be there."""

import math
import re
from typing import NamedTuple

import numpy as np

BITS = {'pred': 8, 'c64': 64, 'c128': 128}  # others say so in their name
KINDS = (
    *('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all'),
    *('collective-permute', 'collective-broadcast'),
)
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(-start)?\((.*)')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)')
_BODY = re.compile(r'body=%?([\w.\-]+)')
_INSTRUCTION = re.compile(r'%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, |$)')
_FREE = re.compile(r'parameter|constant|tuple|get-tuple-element|bitcast|while|.*-start')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """All collectives of one kind along the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    count: int  # a step
    bytes: int  # of the whole arrays on a device, before they are cut up or after they are joined


def squares(hlo, tokens):
    """How often the program names an array with two neighbouring dimensions of so many tokens."""
    return len(re.findall(rf'\[(?:\d+,)*{tokens},{tokens}(?:,\d+)*\]', hlo))


def collectives(hlo, sizes):
    """Text of a compiled program, {mesh axis: size} -> [Collective], the most bytes first.

    Loops of known length count as often as they run.
    """
    found = {}
    computations = _computations(hlo)
    runs = _runs(computations)
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match:
                key = match[2], _axes(line, sizes)
                count, total = found.get(key, (0, 0))
                once = _bytes(match, math.prod(sizes[axis] for axis in key[1]))
                found[key] = count + runs[name], total + runs[name] * once
    rows = [Collective(*key, *value) for key, value in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def looped(hlo):
    """Text of a compiled program -> bytes that loops of known length move after their first pass.

    Operands and results of each instruction, as the compiler counts; its own count has loops once.
    """
    computations = _computations(hlo)
    runs = _runs(computations, _BODY)
    return sum(
        (times - 1) * _traffic(computations[name]) for name, times in runs.items() if times > 1
    )


def _traffic(lines):
    """Bytes that a computation's instructions read and write."""
    found = [match.groups() for match in map(_INSTRUCTION.search, lines) if match]
    sizes = {name: sum(_size(*x) for x in _ARRAY.findall(kind)) for name, kind, *_ in found}
    return sum(
        sizes[name] + sum(sizes.get(x, 0) for x in re.findall(r'%([\w.\-]+)', operands))
        for name, _, op, operands in found
        if not _FREE.fullmatch(op)
    )


def _computations(hlo):
    """{name of a computation: its lines}."""
    found, name = {}, None
    for line in hlo.splitlines():
        head = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
        if head and not line.startswith('HloModule'):
            name = head[1]
            found[name] = ['ENTRY'] if line.startswith('ENTRY') else []
        elif name:
            found[name].append(line)
    return found


def _runs(computations, calls=_CALLED):
    """How often each computation runs: once for the entry, and as it is called from there.

    calls: regex of what calls another, which it names.
    """
    runs = dict.fromkeys(computations, 0)

    def visit(name, times):
        runs[name] += times
        for line in computations[name]:
            for called in calls.findall(line):
                if called in computations:
                    visit(called, times * _passes(line, computations))

    for name, lines in computations.items():
        if lines[:1] == ['ENTRY']:
            visit(name, 1)
    return runs


def _passes(line, computations):
    """How often a loop runs: as the line says, or, for TPUs, as its condition counts from 0; else once."""
    said, condition = _TRIPS.search(line), re.search(r' while\(.*condition=%?([\w.\-]+)', line)
    if said or not condition:
        return int(said[1]) if said else 1
    text = '\n'.join(computations[condition[1]])
    limits = re.findall(r' constant\((\d+)\)', text)
    return int(limits[0]) if len(limits) == 1 and 'direction=LT' in text else 1


def _bytes(match, devices):
    arrays = [_size(*array) for array in _ARRAY.findall(match[1])]
    kind, started = match[2], match[3]
    if started and kind != 'all-reduce':  # (operands, results, contexts)
        arrays = [max(arrays)]
    return sum(arrays) * (devices if kind == 'reduce-scatter' and not started else 1)


def _size(dtype, shape):
    bits = BITS.get(dtype) or int((re.search(r'\d+', dtype) or ['0'])[0])
    return math.prod(int(n) for n in shape.split(',') if n) * bits // 8


def _axes(line, sizes):
    """The mesh axes along which the devices of a group differ."""
    shape, axes = tuple(sizes.values()), tuple(sizes)
    differ = set()
    for group in _groups(line, math.prod(shape)):
        places = np.array(np.unravel_index(group, shape))
        differ |= {axes[i] for i in np.flatnonzero((places != places[:, :1]).any(1))}
    return tuple(axis for axis in axes if axis in differ)


def _groups(line, devices):
    """[[device, ...], ...] in the order of the mesh."""
    pairs = re.search(r'source_target_pairs=\{((?:\{[\d,]+\},?)*)\}', line)
    listed = pairs or re.search(r'replica_groups=\{((?:\{[\d,]+\},?)+)\}', line)
    if listed:
        return [[int(n) for n in g.split(',')] for g in re.findall(r'\{([\d,]+)\}', listed[1])]
    # Groups as rows of the devices' numbers reshaped and transposed: [groups,n]<=[dims]T(order).
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line)
    if not iota:
        return [range(devices)]
    shape, dims, order = (
        [int(n) for n in text.split(',')] if text else None for text in iota.groups()
    )
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(order or range(len(dims))).reshape(shape[0], -1).tolist()
