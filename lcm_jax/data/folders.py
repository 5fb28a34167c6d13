"""A folder of pictures, with captions or without, and pictures made up."""

import json
import os
from pathlib import Path

import numpy as np

from lcm_jax.data.files import reading, stamp
from lcm_jax.data.samples import Broken, Raw, captions_of, describe, index_of, row, size_of
from lcm_jax.data.tars import PICTURES, metadata
from lcm_jax.errors import InputError

TABLE = 'metadata.jsonl'
COLORS = {
    **{'red': (214, 40, 40), 'green': (46, 139, 87), 'blue': (38, 84, 180)},
    **{'yellow': (250, 209, 60), 'black': (20, 20, 20), 'white': (250, 250, 250)},
}


def contents(source, texts=()):
    """'FAMILY:DIR' -> [Path] of its pictures, sorted, their names in it, and more of its Index.

    That is what is passed over, all that is neither read nor hidden, and a stamp of what is read. texts:
    extensions of what may lie beside a picture. Raises InputError.
    """
    root = Path(source.partition(':')[2])
    if not root.is_dir():
        raise InputError(f'{source}: there is no such folder')
    everything = [(file.relative_to(root).as_posix(), file) for file in sorted(walk(root))]
    pictures = [(name, file) for name, file in everything if file.suffix.lower()[1:] in PICTURES]
    names, files = map(list, zip(*pictures, strict=True)) if pictures else ([], [])
    read = {*names, *(f'{name.rpartition(".")[0]}.{text}' for name in names for text in texts)}
    read |= {TABLE} if texts else set()
    passed, said = [], []
    for name, file in everything:
        if name in read:
            at = file.stat() if file.exists() else None  # a link may lead nowhere
            said.append([name, at and [at.st_size, at.st_mtime_ns]])
        elif not any(part.startswith('.') for part in name.split('/')):
            alone = ' without a picture' if file.suffix[1:] in texts else ''
            reason = f'{file.suffix}{alone}' if file.suffix else 'without an extension'
            passed.append((name, reason, ''))
    return files, names, {'passed': passed, 'stamp': stamp(said)}


def walk(folder, above=()):
    """The files in a folder and in those within, linked ones too, but for links to one above."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with reading(folder), os.scandir(folder) as entries:
        found = [(entry.path, entry.is_dir()) for entry in entries]
    for path, is_folder in found:
        if is_folder:
            yield from walk(path, (*above, here))
        else:
            yield Path(path)


def open_folder(folder, caption):
    """A folder and those within, linked ones too -> Index, fetch(place).

    Captions are in NAME.txt beside NAME.png (or NAME.json, where `caption` is a field of it), or in
    metadata.jsonl with file_name and text (Hugging Face's `imagefolder`).
    """
    files, names, more = contents(f'folder:{folder}', (caption, 'json'))
    table = metadata_table(Path(folder))
    rows, here = [], {*names}
    broken = [(name, 'no picture', 'metadata.jsonl names it') for name in table if name not in here]
    for i, (name, file) in enumerate(zip(names, files, strict=True)):
        try:
            parts, meta = told(file, table.get(name, {}), caption)
            with open(file, 'rb') as picture:
                rows.append(row(name, (i,), picture, parts, meta, caption))
        except Broken as e:
            broken.append((name, e.reason, e.detail))
        except OSError as e:
            broken.append((name, 'file cannot be read', describe(e)))
    return index_of(rows, broken, **more), Folder(files, names, table, caption)


def open_pictures(folder):
    """A folder and those within, pictures only -> Index, fetch(place); every caption is ''."""
    files, names, more = contents(f'pictures:{folder}')
    rows, broken = [], []
    for i, (name, file) in enumerate(zip(names, files, strict=True)):
        try:
            with open(file, 'rb') as picture:
                size = size_of(picture)
            rows.append((name, size, size, (np.nan,) * 3, (i,)))
        except Broken as e:
            broken.append((name, e.reason, e.detail))
        except OSError as e:
            broken.append((name, 'file cannot be read', describe(e)))
    return index_of(rows, broken, **more), Pictures(files)


class Pictures:
    """fetch(place) -> Raw without a caption. Raises Broken."""

    def __init__(self, files):
        self.files = files

    def __call__(self, place):
        try:
            return Raw(self.files[int(place[0])].read_bytes(), ('',))
        except OSError as e:
            raise Broken('file cannot be read', describe(e)) from e


class Folder:
    """fetch(place) -> Raw. Raises Broken."""

    def __init__(self, files, names, table, caption):
        self.files, self.names, self.table, self.caption = files, names, table, caption

    def __call__(self, place):
        i = int(place[0])
        try:
            parts, meta = told(self.files[i], self.table.get(self.names[i], {}), self.caption)
            picture = self.files[i].read_bytes()
        except OSError as e:
            raise Broken('file cannot be read', describe(e)) from e
        return Raw(picture, captions_of(self.caption, parts, meta))


def beside(file, extension):
    """-> the path of the file of the same name that has this extension."""
    return file.parent / f'{file.stem}.{extension}'


def told(file, meta, caption):
    """What is said of a picture -> {extension: bytes}, metadata. Raises Broken, OSError."""
    text, table = beside(file, caption), beside(file, 'json')
    parts = {caption: text.read_bytes()} if text.is_file() else {}
    return parts, meta | (metadata(table.read_bytes()) if table.is_file() else {})


def metadata_table(root):
    """metadata.jsonl of a folder -> {file name: dict}; {} if there is none. Raises InputError.

    Bytes that are not UTF-8 come as lone surrogates, which `captions_of` refuses.
    """
    file = root / TABLE
    if not file.is_file():
        return {}
    table, lines = {}, {}
    for number, line in enumerate(file.read_bytes().split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line.decode(errors='surrogateescape'))
            first = lines.setdefault(name := said['file_name'], number)
        except (ValueError, TypeError, KeyError) as e:
            raise InputError(
                f'{file}:{number}: not a JSON object with file_name: {describe(e)}'
            ) from e
        if first != number:
            raise InputError(
                f'{file}:{number}: {name} is in line {first} too; write one line for each picture: '
                'several captions are a list in it'
            )
        table[name] = said
    return table


def open_synthetic(count, resolution, seed):
    """'N' -> Index, fetch(place): N discs on plain grounds, from `resolution` to 1.5 times that."""
    if not count.isdigit() or not int(count):
        raise InputError(f'synthetic:{count}: write synthetic:N, N pictures')
    sizes = np.random.default_rng((seed, 0)).integers(
        resolution, resolution * 3 // 2 + 1, (int(count), 2)
    )
    rows = [
        (f'{i:08d}', size, size, (np.nan,) * 3, (i, *size)) for i, size in enumerate(sizes.tolist())
    ]
    return index_of(rows), Synthetic(seed)


class Synthetic:
    """fetch(place) -> Raw."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, place):
        i, height, width = place.tolist()
        rng = np.random.default_rng((self.seed, 1, i))
        disc, ground = rng.choice(list(COLORS), 2, replace=False)
        y, x = (rng.uniform(0.3, 0.7) * n for n in (height, width))
        radius = rng.uniform(0.1, 0.3) * min(height, width)
        rows, columns = np.ogrid[:height, :width]
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        picture = np.where(inside[..., None], np.uint8(COLORS[disc]), np.uint8(COLORS[ground]))
        return Raw(picture, (f'a {disc} disc on {ground}',))
