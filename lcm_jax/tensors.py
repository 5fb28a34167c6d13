"""Tensors on disk: opened by their headers, read one at a time, written one at a time."""

import dataclasses
import importlib
import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from lcm_jax.atomic import whole
from lcm_jax.errors import InputError, first_line

# Names in a safetensors header, in the order in which the library writes them (the last comes first).
DTYPES = {
    'BOOL': np.dtype(np.bool_),
    'U8': np.dtype(np.uint8),
    'I8': np.dtype(np.int8),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'I16': np.dtype(np.int16),
    'U16': np.dtype(np.uint16),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I32': np.dtype(np.int32),
    'U32': np.dtype(np.uint32),
    'F32': np.dtype(np.float32),
    'F64': np.dtype(np.float64),
    'I64': np.dtype(np.int64),
    'U64': np.dtype(np.uint64),
}
POINTER = b'version https://git-lfs'  # what a file of Git LFS begins with until it is fetched
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is not in memory: `np.asarray` calls `read`, which may raise InputError.

    What comes may be a view of the file, read-only, for as long as it lives: copy it to keep it.
    """

    name: str  # file and key, for errors
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None):
        return np.array(self.read(), dtype, copy=copy)

    def map(self, fn, shape=None):
        """fn of the array, once it is read; `shape` is that of the result, if another."""
        shape = self.shape if shape is None else tuple(shape)
        return dataclasses.replace(self, shape=shape, read=lambda: fn(self.read()))

    def reshape(self, shape):
        return self.map(lambda x: x.reshape(shape), shape)

    def transpose(self, axes):
        return self.map(lambda x: x.transpose(axes), (self.shape[i] for i in axes))

    def astype(self, dtype):
        """The same in another dtype, its axes in the same order in memory."""
        dtype = np.dtype(dtype)

        def cast(x):
            with np.errstate(over='ignore'):
                y = x.astype(dtype, order='K')
            if not finite(y):
                raise InputError(f'{self.name} holds values that {dtype} cannot')
            return y

        return self if dtype == self.dtype else dataclasses.replace(self.map(cast), dtype=dtype)


def lazy(x, name='tensor'):
    """An array or Tensor -> Tensor."""
    if isinstance(x, Tensor):
        return x
    return Tensor(name, tuple(x.shape), np.dtype(x.dtype), lambda: np.asarray(x))


def finite(x):
    """Whether an array holds no NaN and no infinity; integers never do.

    Above the bits of infinity lie, as unsigned numbers, the negative NaNs and, as signed ones, the
    positive: two passes of integer maxima, without a temporary and at memory speed in every dtype.
    """
    try:
        info = ml_dtypes.finfo(x.dtype)
    except ValueError:
        return True
    if not x.size:
        return True
    unsigned, signed = (np.dtype(f'{kind}{x.dtype.itemsize}') for kind in 'ui')
    top = int(np.asarray(info.max).view(unsigned))
    return x.view(signed).max() <= top and x.view(unsigned).max() <= top + 2 ** (
        8 * x.dtype.itemsize - 1
    )


def _there(file):
    """A file's name -> Path. InputError if it is not there, or is what git leaves in its place."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f'no such file: {file}')
    try:
        with open(file, 'rb') as f:
            start = f.read(len(POINTER))
    except OSError as e:
        raise InputError(f'cannot read {file}: {e}') from e
    if start == POINTER:
        raise InputError(f'{file} is a pointer of Git LFS, not the file: fetch it, `git lfs pull`')
    return file


def open_tensors(file):
    """A .safetensors file -> ({key: Tensor}, metadata); only its header is read.

    Reading a tensor that is not finite raises InputError, as does a file that is not whole.
    """
    file = _there(file)
    try:
        with safetensors.safe_open(file, framework='np') as f:  # checks the whole header
            metadata = f.metadata() or {}
        with open(file, 'rb') as f:
            size = int.from_bytes(f.read(8), 'little')
            header = json.loads(f.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as e:
        raise InputError(f'{file} is not a readable safetensors file: {e}') from e
    header.pop('__metadata__', None)
    for key, entry in header.items():
        if entry['dtype'] not in DTYPES:
            raise InputError(f'{file}: {key} is of type {entry["dtype"]}, not {", ".join(DTYPES)}')

    def tensor(key, dtype, shape, data_offsets):
        dtype, count = DTYPES[dtype], math.prod(shape)

        def read():
            if not count:
                return np.empty(shape, dtype)
            try:
                x = np.memmap(file, dtype, 'r', 8 + size + data_offsets[0], tuple(shape))
            except (OSError, ValueError) as e:
                raise InputError(f'{file} has changed since it was opened: {e}') from e
            if not finite(x):
                raise InputError(f'{file}: {key} holds values that are not finite')
            return np.asarray(x)

        return Tensor(f'{file}: {key}', tuple(shape), dtype, read)

    return {key: tensor(key, **entry) for key, entry in header.items()}, metadata


def read_tensors(file):
    """A .safetensors file -> ({key: numpy array}, metadata). Raises InputError naming the file."""
    tensors, metadata = open_tensors(file)
    return {key: np.array(x) for key, x in tensors.items()}, metadata


def write_tensors(file, tensors, metadata=None):
    """Write {key: array or Tensor} as a .safetensors file, one tensor in memory at a time.

    Bytes are those of safetensors' own `save_file`. The file appears whole or not at all.
    """
    ranks = list(DTYPES)
    items = sorted(
        tensors.items(), key=lambda item: (-ranks.index(NAMES[np.dtype(item[1].dtype)]), item[0])
    )
    header, end = {'__metadata__': {'format': 'pt', **(metadata or {})}}, 0
    for key, x in items:
        start, end = end, end + math.prod(x.shape) * np.dtype(x.dtype).itemsize
        name = NAMES[np.dtype(x.dtype)]
        header[key] = {'dtype': name, 'shape': list(x.shape), 'data_offsets': [start, end]}
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    with whole(file) as part, open(part, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for _, x in items:
            np.ascontiguousarray(x).reshape(-1).view(np.uint8).tofile(f)


def open_pickle(file):
    """A PyTorch file (.ckpt, .bin, .pt) -> {key: Tensor}, by torch's weights-only loader.

    Needs torch, which this package does not; InputError without it, or if there is more than weights.
    """
    file = _there(file)
    try:
        torch = importlib.import_module('torch')
    except ImportError as e:
        raise InputError(
            f'{file} is a pickle, which only PyTorch can read safely. Where torch is installed, write it '
            f'as safetensors: `safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), '
            f'{file.with_suffix(".safetensors").name!r})`, or, for whole models, `lcm-jax convert`'
        ) from e
    try:
        zipped = zipfile.is_zipfile(file)  # torch maps these; older files are read as a whole
        found = torch.load(file, map_location='cpu', weights_only=True, mmap=zipped)
    except Exception as e:  # pickle, torch and zip raise many types
        raise InputError(_unread(file, e)) from e
    found = found.get('state_dict', found) if isinstance(found, dict) else {}
    tensors = {key: x for key, x in found.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise InputError(f'{file} holds no tensors')

    def tensor(key, x):
        dtype = np.dtype(getattr(ml_dtypes, name := str(x.dtype).removeprefix('torch.'), name))

        def read():
            y = x.contiguous().view(torch.uint8).numpy().view(dtype).reshape(x.shape)
            if not finite(y.reshape(-1)):
                raise InputError(f'{file}: {key} holds values that are not finite')
            return y

        return Tensor(f'{file}: {key}', tuple(x.shape), dtype, read)

    return {key: tensor(key, x) for key, x in tensors.items()}


def _unread(file, error):
    """What to say of a pickle that torch's weights-only loader refuses."""
    if other := re.search(r'GLOBAL (\S+)', str(error)):
        return (
            f'{file} holds more than weights ({other[1]}), as training programs such as Lightning '
            f'save it; what reads such objects may run any code in them, so it is not read. Take a '
            f'.safetensors file of the model, or, if you trust this one, write its weights alone: '
            f'`torch.save(torch.load({file.name!r}, weights_only=False)["state_dict"], "weights.ckpt")`'
        )
    said = re.search(r'WeightsUnpickler error: (.+)', str(error))
    return f'{file} is not a PyTorch file of weights: {said[1] if said else first_line(error)}'


def read_json(file):
    """A .json file -> its value. Raises InputError naming the file."""
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as e:
        raise InputError(f'cannot read {file}: {e}') from e
