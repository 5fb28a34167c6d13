"""Webdataset and img2dataset tars: indexed once by their headers, then read by offset."""

import functools
import gzip
import io
import json
import tarfile
import zlib

from lcm_jax.data.files import opened, read_range, reading
from lcm_jax.data.samples import Broken, Raw, captions_of, describe, index_of, row
from lcm_jax.errors import InputError

# Extensions; of several in a sample the first is its picture, the others a mask or a depth map perhaps.
PICTURES = ('jpg', 'jpeg', 'jfif', 'png', 'webp', 'gif', 'bmp')
BLOCK = 512  # bytes of a tar header; a block of zeros ends the tar


def index(url, caption):
    """A tar -> its Index; places are (picture offset, size, text offset, size, text is JSON).

    Members that follow each other with one key (the name up to its first dot) make a sample; an
    extension that the sample has already starts a new one, as LAION's tars need. Of several pictures of
    a sample the first of PICTURES is taken, and the others are named in `passed`. A tar that ends
    early keeps the samples before that, and is named in `cut`. Raises InputError for a remote file
    that cannot be read now: what it holds is not known by that.
    """
    rows, broken, cut, passed, seen, repeats = [], [], [], [], set(), 0
    try:
        if url.endswith('gz') and inflated(url)[1]:
            cut.append((url, inflated(url)[1]))
        with uncompressed(url) as file:
            for key, members in grouped(file):
                repeats += key in seen
                seen.add(key)
                try:
                    rows.append(sample(key, members, file, caption))
                    first, *others = pictures_of(members)
                    whose = f'of a sample with a .{first}'
                    passed += [(f'{key}.{other}', f'.{other} {whose}', '') for other in others]
                except Broken as e:
                    broken.append((key, e.reason, e.detail))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as e:
        cut = cut or [(url, describe(e))]
    return index_of(rows, broken, cut, repeats, passed=passed)


def uncompressed(url):
    """A tar -> an open file that can be sought in."""
    return io.BytesIO(inflated(url)[0]) if url.endswith('gz') else opened(url)


@functools.cache
def inflated(url):
    """A compressed tar cannot be read by offset: it is held in memory -> bytes, what is wrong or ''.

    A file that is cut short or damaged gives what comes before that.
    """
    out = io.BytesIO()
    with opened(url) as file, gzip.open(file) as plain:
        try:
            while chunk := plain.read(1 << 20):
                out.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            return out.getvalue(), describe(e)
    return out.getvalue(), ''


def grouped(file):
    """Open tar -> (key, {extension: (offset, size)}) of each sample. Raises TarError if cut short."""
    key, members = None, {}
    with tarfile.open(fileobj=file, mode='r:') as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, slash, name = member.name.rpartition('/')
            stem, _, extension = name.partition('.')
            extension = extension.lower()
            if not stem or not extension:  # hidden files, such as ._0.jpg of macOS, and README
                continue
            if members and (folder + slash + stem != key or extension in members):
                yield key, members
                members = {}
            key = folder + slash + stem
            members[extension] = member.offset_data, member.size
        file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f'no tar header and no end mark at byte {tar.offset}')
    if members:
        yield key, members


def pictures_of(members):
    """-> the extensions of its pictures, that of the sample's first."""
    return [extension for extension in PICTURES if extension in members]


def sample(key, members, file, caption):
    """{extension: (offset, size)} -> a row of the index. Raises Broken."""
    pictures = pictures_of(members)
    if not pictures:
        raise Broken('no picture', f'it has {", ".join(sorted(members))}')

    def read(extension):
        file.seek(members[extension][0])
        return file.read(members[extension][1])

    parts = {caption: read(caption)} if caption in members else {}
    meta = metadata(read('json')) if 'json' in members else {}
    text = caption if parts else 'json'
    start, size = members[pictures[0]]
    place = (start, size, *members.get(text, (0, 0)), not parts)
    return row(key, place, Window(file, start, size), parts, meta, caption)


def metadata(text):
    """JSON bytes -> dict. Raises Broken."""
    try:
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise ValueError(f'a {type(meta).__name__}, not an object')
    except (ValueError, RecursionError) as e:
        raise Broken('JSON cannot be read', describe(e)) from e
    return meta


class Window(io.RawIOBase):
    """A part of an open file as a file of its own, so that only a picture's header is read."""

    def __init__(self, file, start, size):
        self.file, self.start, self.size, self.at = file, start, size, 0

    def read(self, n=-1):
        left = self.size - self.at
        try:
            self.file.seek(self.start + self.at)
            got = self.file.read(left if n is None or n < 0 else min(n, left))
        except OSError as e:  # of a mounted disk, perhaps: it says nothing about the picture
            name = getattr(self.file, 'name', 'a tar')
            raise InputError(f'{name} cannot be read now: {describe(e)}') from e
        self.at += len(got)
        return got

    def seek(self, offset, whence=0):
        self.at = min(max(0, offset + (0, self.at, self.size)[whence]), self.size)
        return self.at

    def tell(self):
        return self.at

    def seekable(self):
        return True


def fetch(url, place, caption):
    """A sample by its place -> Raw. Raises Broken, and InputError for a file that cannot be read."""
    picture_at, picture_size, text_at, text_size, is_json = (int(x) for x in place)

    def read(offset, size):
        if url.endswith('gz'):
            with reading(url):
                return inflated(url)[0][offset : offset + size]
        return read_range(url, offset, size)

    text = read(text_at, text_size)
    parts, meta = ({}, metadata(text)) if is_json else ({caption: text}, {})
    return Raw(read(picture_at, picture_size), captions_of(caption, parts, meta))
