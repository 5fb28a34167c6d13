"""Files here and elsewhere: patterns, reading by offset, and indexes that are kept."""

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import BadZipFile

import fsspec
import numpy as np

from lcm_jax.atomic import whole
from lcm_jax.data.samples import Broken, Index, describe
from lcm_jax.errors import InputError

VERSION = 4  # of the kept indexes
WAITS = 0.5, 1.0, 2.0, 4.0  # seconds before a read that failed is tried again
KEEP_AFTER = 1.0  # seconds that an index must have taken to be worth keeping
# Columns that are no arrays.
LISTS = ('names', 'broken', 'cut', 'repeats', 'files', 'passed', 'stamp')
CHANGES = ('size', 'mtime', 'etag', 'ETag', 'LastModified', 'updated', 'created')


def remote(url):
    return '://' in url


@contextlib.contextmanager
def reading(url):
    """What goes wrong with the file is an InputError that names it: stores have errors of all kinds."""
    try:
        yield
    except InputError:  # of a file inside, which it names
        raise
    except Exception as e:
        raise InputError(f'cannot read {url}: {describe(e)}') from e


def patiently(url, read):
    """read() of a file, tried again after each of WAITS: stores fail for a moment. Raises InputError."""
    for wait in WAITS:
        with contextlib.suppress(InputError), reading(url):
            return read()
        time.sleep(wait)
    with reading(url):
        return read()


class Elsewhere:
    """An open remote file. What goes wrong with it, now or then, is not taken for damage: InputError."""

    def __init__(self, url):
        self.url = url
        with reading(url):
            self.file = fsspec.open(url, 'rb').open()

    def read(self, size=-1):
        return patiently(self.url, lambda: self.file.read(size))

    def seek(self, offset, whence=0):
        return self.file.seek(offset, whence)

    def tell(self):
        return self.file.tell()

    def seekable(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def opened(url):
    """-> an open file that can be sought in. Raises OSError; for a remote file, InputError."""
    return Elsewhere(url) if remote(url) else open(url, 'rb')


def listed(folder):
    """A path or url -> names of what is in that folder, sorted; [] if there is none. Raises InputError."""
    with reading(folder):
        try:
            fs, path = fsspec.core.url_to_fs(folder)
            return sorted(p.rsplit('/', 1)[-1] for p in fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


def expand(pattern):
    """A path or url with {00000..00041}, {a,b} and * ? [] -> sorted urls; none is an InputError."""
    urls = []
    for each in braces(pattern):
        if not any(c in each for c in '*?['):
            urls.append(each)
            continue
        with reading(each):
            fs, path = fsspec.core.url_to_fs(each)
            urls += [fs.unstrip_protocol(p) if remote(each) else p for p in sorted(fs.glob(path))]
    if not urls:
        raise InputError(f'no file matches {pattern}')
    return urls


def braces(pattern):
    """'{08..10}.tar' -> 08.tar, 09.tar, 10.tar; '{a,b}.tar' -> a.tar, b.tar; from left to right."""
    found = re.search(r'\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}', pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        words = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        words = words.split(',')
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [head + word + rest for word in words for rest in braces(tail)]


@functools.lru_cache(256)
def handle(path):
    """An open file; it is closed when it falls out of the cache and its last reader is done."""
    return open(path, 'rb', buffering=0)


def read_range(url, offset, size):
    """`size` bytes of a file from `offset` on. Raises Broken if it ends before that, else InputError."""

    def read():
        if remote(url):
            fs, path = fsspec.core.url_to_fs(url)
            return fs.cat_file(path, start=offset, end=offset + size)
        file = handle(url)  # held, so that it stays open until it has been read
        return os.pread(file.fileno(), size, offset)

    got = patiently(url, read)
    if len(got) != size:
        raise Broken('file ends early', f'{len(got)} of {size} bytes at {offset}')
    return got


def gather(urls, index_one, caption, threads):
    """The indexes of files, as one. Each row's place is its file's number, then the file's own.

    index_one(url, caption) -> Index; what takes long is kept in `cache_folder()` for the next time,
    by the file's size and date.
    """
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda url: kept(url, index_one, caption), urls))
    names, broken, passed = [], [], []
    for url, part in zip(urls, parts, strict=True):
        short = url.rsplit('/', 1)[-1]
        names += [f'{short}/{name}' for name in part.names]
        for out, rows in ((broken, part.broken), (passed, part.passed)):
            out += [(f'{short}/{name}', *rest) for name, *rest in rows]
    filled = [(i, part) for i, part in enumerate(parts) if part.names]
    return Index(
        names,
        *(
            np.concatenate([getattr(part, column) for _, part in filled] or [np.zeros((0, width))])
            for column, width in (('sizes', 2), ('original', 2), ('scores', 3))
        ),
        np.concatenate(
            [np.insert(part.places, 0, i, axis=1) for i, part in filled]
            or [np.zeros((0, 1), np.int64)]
        ),
        broken,
        [cut for part in parts for cut in part.cut],
        sum(part.repeats for part in parts),
        len(urls),
        passed,
        stamp([part.stamp for part in parts]),
    )


def cache_folder():
    """Where indexes are kept: lcm_jax/index under $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'lcm_jax' / 'index'


def kept(url, index_one, caption):
    """index_one(url, caption), from the cache if it has that. Raises InputError for no file."""
    with reading(url):
        fs, path = fsspec.core.url_to_fs(url)
        info = fs.info(path)
    said = {key: str(info[key]) for key in CHANGES if key in info}
    key = [VERSION, index_one.__module__, fs.unstrip_protocol(path), caption, said]
    now = {'stamp': stamp([*said.items()][:2])}  # a copy of the same date was created at another
    file = cache_folder() / f'{stamp(key)}.npz'
    try:
        with np.load(file) as got:
            lists = json.loads(str(got['lists']))
            columns = {c: got[c] for c in Index._fields if c not in LISTS}
            return Index(**lists | now, **columns)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # not there, or not whole
        pass
    start = time.monotonic()
    index = index_one(url, caption)
    if not index.cut and time.monotonic() - start >= KEEP_AFTER:  # reading may go better next time
        columns = index._asdict()
        lists = {c: columns.pop(c) for c in LISTS}
        keep(file, columns | {'lists': json.dumps(lists)})
    return index._replace(**now)


def stamp(said):
    """What JSON holds -> text that it is known by."""
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def keep(file, arrays):
    """Write a .npz file of the cache. A folder that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError), whole(file) as part:
        np.savez(part, **arrays)
