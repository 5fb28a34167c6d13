"""Parameter trees as orbax checkpoints, written and read a few arrays at a time."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from lcm_jax.errors import InputError
from lcm_jax.tensors import Tensor, finite

BATCH = 2**27  # bytes read and written together: every write waits for the disk


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


def write_tree(folder, tree):
    """Write a tree of Tensors as an orbax checkpoint that `StandardCheckpointer` restores."""
    registry = type_handlers.create_type_handler_registry(
        (Tensor, _Streaming(deepcopy_host_arrays=False)),
        (jax.Array, type_handlers.ArrayHandler()),  # orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(folder).resolve(), args=ocp.args.PyTreeSave(tree))


def open_tree(folder):
    """An orbax checkpoint -> its nested dict of Tensors; only metadata is read.

    Raises InputError naming the folder, also when an array that is damaged is read.
    """
    folder = Path(folder).resolve()

    def said(e):
        return (str(e).strip() or type(e).__name__).splitlines()[0]

    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
    except Exception as e:  # orbax and tensorstore raise many types for a damaged checkpoint
        raise InputError(f'{folder} is not a readable orbax checkpoint: {said(e)}') from e
    context = ts.Context()
    base = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{folder}/'}}

    def tensor(path, x):
        name = '.'.join(key.key for key in path)
        spec = {'driver': 'zarr', 'kvstore': base | {'path': f'{name}/'}}

        def read():
            try:
                array = ts.open(spec, context=context, read=True).result().read().result()
            except Exception as e:
                raise InputError(f'{folder} is not a readable orbax checkpoint: {said(e)}') from e
            if not finite(array):
                raise InputError(f'{folder}: {name} holds values that are not finite')
            return array

        return Tensor(f'{folder}: {name}', tuple(x.shape), np.dtype(x.dtype), read)

    return jax.tree_util.tree_map_with_path(tensor, tree)
