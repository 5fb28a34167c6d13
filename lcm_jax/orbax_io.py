"""Parameter trees as orbax checkpoints, written and read a few arrays at a time."""

import contextlib
import json
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from lcm_jax.errors import InputError, first_line
from lcm_jax.tensors import Tensor, finite

BATCH = 2**27  # bytes read and written together: every write waits for the disk
COMMITTED = 'commit_success.txt'  # the last file of a checkpoint, and of each of its parts


class _Streaming(type_handlers.NumpyHandler):
    """orbax's handler of numpy arrays, for Tensors: each is read when its turn to be written comes."""

    async def _background_serialize(self, values, infos, args=None):
        rows = []
        for value, *row in zip(values, infos, args, strict=True):
            rows.append((np.asarray(value, order='C'), *row))
            if sum(array.nbytes for array, *_ in rows) > BATCH:
                await super()._background_serialize(*zip(*rows, strict=True))
                rows = []
        if rows:
            await super()._background_serialize(*zip(*rows, strict=True))


@contextlib.contextmanager
def unlogged():
    """Orbax logs nothing: of an error that is raised a page of tracebacks."""
    log = logging.getLogger('absl')
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def write_tree(folder, tree):
    """Write a tree of Tensors as an orbax checkpoint that `StandardCheckpointer` restores."""
    registry = type_handlers.create_type_handler_registry(
        (Tensor, _Streaming(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),  # orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with unlogged(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(folder).resolve(), args=ocp.args.PyTreeSave(tree))


def open_tree(folder):
    """An orbax checkpoint -> its nested dict of Tensors; only metadata is read.

    Raises InputError naming the folder, also when an array that is damaged is read.
    """
    folder = Path(folder).resolve()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
    except Exception as e:  # orbax and tensorstore raise many types for a damaged checkpoint
        raise InputError(f'{folder} is not a readable orbax checkpoint: {first_line(e)}') from e
    context = ts.Context()
    base = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{folder}/'}}

    def tensor(path, x):
        name = '.'.join(key.key for key in path)
        spec = {'driver': 'zarr', 'kvstore': base | {'path': f'{name}/'}}

        def read():
            try:
                array = ts.open(spec, context=context, read=True).result().read().result()
            except Exception as e:
                raise InputError(
                    f'{folder} is not a readable orbax checkpoint: {first_line(e)}'
                ) from e
            if not finite(array):
                raise InputError(f'{folder}: {name} holds values that are not finite')
            return array

        return Tensor(f'{folder}: {name}', tuple(x.shape), np.dtype(x.dtype), read)

    return jax.tree_util.tree_map_with_path(tensor, tree)


def fault(folder, trees=(), records=()):
    """What a checkpoint of several parts lacks -> text, or None if all is there that orbax wrote.

    folder: of the checkpoint; trees, records: names of its parts that hold arrays and JSON. Looked at
    are the markers of the commits, the metadata, and the files that the arrays lie in, but not the
    arrays: bytes that changed in one are not noticed, as orbax keeps no sums of them.
    """
    described = '_CHECKPOINT_METADATA', *(f'{part}/metadata' for part in records)
    described += tuple(f'{tree}/_METADATA' for tree in trees)
    marked = (f'{part}/{COMMITTED}' for part in (*trees, *records))
    for name in (COMMITTED, *marked, *described):
        if not (folder / name).is_file():
            return f'{name} is missing'
    for name in (*described, *(f'{tree}/array_metadatas/*' for tree in trees), 'metrics/metrics'):
        for file in folder.glob(name):
            try:
                json.loads(file.read_bytes())
            except ValueError:
                return f'{file.relative_to(folder)} is not JSON'
    for tree in trees:
        try:
            sizes = _array_files(folder / tree)
        except ValueError as e:  # tensorstore's: indices are missing or do not match their sum
            return f'the index of {tree}: {first_line(e)}'
        for name, size in sizes.items():
            file = folder / tree / name
            have = file.stat().st_size if file.is_file() else 0
            if have < size:
                return f'{tree}/{name} has {have} bytes of {size}'
    return None


def _array_files(folder):
    """The files of a tree's arrays, from its index -> {path in the folder: bytes that it has at least}."""
    store = ts.KvStore.open({'driver': 'file', 'path': f'{folder}/'}).result()
    root = ts.ocdbt.dump(store).result()['versions'][-1]['root']
    nodes, sizes = [root['location']], {}
    for node in nodes:  # which grows: a large tree's nodes name others
        for entry in ts.ocdbt.dump(store, node).result()['entries']:
            if 'location' in entry:
                nodes.append(entry['location'])
            elif 'indirect_value' in entry:  # others hold their value
                _, base, file, offset, size = entry['indirect_value'].split(':')
                sizes[base + file] = max(sizes.get(base + file, 0), int(offset) + int(size))
    return sizes
