"""What is in a source, as a run would read it."""

import time

import numpy as np
from PIL import Image, ImageOps

from lcm_jax.data.loader import One, groups, iterate
from lcm_jax.data.order import CHECK
from lcm_jax.data.pairs import picked
from lcm_jax.data.pictures import draw, prepare
from lcm_jax.data.samples import Broken, Drops, decode
from lcm_jax.grid import grid

ROWS, DRAWS, TILE = 10, 4, 128  # of the contact sheet
LABEL = 160  # letters of a caption on it


def report(source, tokenizer, settings, limit):
    """Lines about a source, of which `limit` samples (0: all) are read, picked by chance."""
    index = source.index
    total = len(index.names) + len(source.broken)
    yield f'{source.name}: {len(source):,} of {total:,} samples'
    yield from source.left_out()
    if index.repeats:
        yield f'keys that came before in the same file: {index.repeats:,}; each is a sample'
    if source.encoded:
        yield f'encoded by {source.encoded["model"]!r} at {source.encoded["resolution"]} px'
        for name, said in source.encoded['arrays'].items():
            yield f'  {name}: {said["dtype"]} {" ".join(map(str, said["shapes"].values()))}'
    yield f'pictures, height x width: {spread(source.sizes)}'
    for (h, w), ids in groups(source, settings):
        yield f'cut to {h} x {w}: {len(ids):,}'
    ids = picked(source, min(limit, len(source)), (CHECK, settings.seed))
    yield from reading(source, tokenizer, settings, ids)


def reading(source, tokenizer, settings, ids):
    """Read samples -> lines about captions, broken samples and speed."""
    maker, broken, lengths = Lengths(source, tokenizer, settings, ids), Drops(), []
    start = time.perf_counter()
    for name, fault, length in iterate(maker.length, range(len(ids)), settings):
        if fault:
            broken.add(fault[0], name, fault[1])
        elif length:
            lengths.append(length)
    seconds = time.perf_counter() - start
    if lengths:
        most = tokenizer.length
        yield (
            f'captions: {np.mean(lengths):.1f} tokens on average (start and end included), from '
            f'{min(lengths)} to {max(lengths)}; {sum(n > most for n in lengths):,} of '
            f'{len(lengths):,} are longer than {most} and will be cut'
        )
    if broken:
        yield f'broken, when read: {broken}'
    yield f'read {len(ids):,} samples at {len(ids) / seconds:,.0f} per second'


class Lengths(One):
    """Reads single samples as a run does, and counts their captions' tokens."""

    def __init__(self, source, tokenizer, settings, ids):
        super().__init__(source, (), settings)
        self.tokenizer, self.ids = tokenizer, ids

    def length(self, j):
        """-> name, (reason, detail) if it is broken, tokens of the caption, if there is one."""
        name, _, caption, fault = self.one(int(self.ids[j]))
        return name, fault, caption and int(self.tokenizer.cut([caption])[1][0])


def spread(sizes):
    """[N,2] -> smallest, median and largest height and width."""
    if len(np.unique(sizes, axis=0)) == 1:
        return f'{sizes[0, 0]} x {sizes[0, 1]}, all'
    rows = zip(('from', 'median', 'to'), np.percentile(sizes, (0, 50, 100), 0), strict=True)
    return ', '.join(f'{word} {h:.0f} x {w:.0f}' for word, (h, w) in rows)


def contact_sheet(source, settings):
    """Some samples as they are stored, and as a run cuts and flips them -> PIL image."""
    shape_of = {i: shape for shape, ids in groups(source, settings) for i in ids.tolist()}
    names, cells = [], []
    for i in picked(source, min(ROWS, len(source)), (CHECK, settings.seed)).tolist():
        try:
            raw = source.read(i)
            picture = decode(raw.picture)
            cuts = [cut(picture, source, i, shape_of[i], k, settings) for k in range(DRAWS)]
        except Broken as e:
            names.append(f'{source.sample_name(i)}: {e.reason}')
            cells.append([])
            continue
        names.append(f'{source.sample_name(i)}: {raw.captions[0]}'[:LABEL])
        cells.append([tile(p) for p in (picture, *cuts)])
    columns = ['as stored', *(f'draw {k + 1}' for k in range(DRAWS))]
    return grid(names, columns, cells, tile=TILE, label_width=330)


def cut(picture, source, i, shape, step, settings):
    """A sample's picture as step `step` cuts it -> PIL image. Raises Broken."""
    drawn = draw(settings.seed, step, i, settings)
    return Image.fromarray(prepare(picture, source.original(i), shape, drawn)[0])


def tile(picture):
    """A square on grey that holds the whole picture."""
    return ImageOps.pad(picture, (TILE, TILE), Image.Resampling.LANCZOS, 'grey')
