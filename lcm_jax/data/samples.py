"""What a source holds: samples, their index, and a count of those that are left out."""

import io
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from lcm_jax.errors import InputError
from lcm_jax.images import rgb

ORIENTATION = 274  # EXIF tag; 5..8 are turned by a quarter
SCORES = {  # what they are called in metadata: by LAION's sets, then by COYO
    'watermark': ('pwatermark', 'watermark_score'),
    'aesthetic': ('aesthetic', 'AESTHETIC_SCORE', 'aesthetic_score', 'aesthetic_score_laion_v2'),
    'unsafe': ('punsafe', 'nsfw_score_opennsfw2'),
}
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')  # that PIL shall try, in this order


class Raw(NamedTuple):
    """One sample as it is stored."""

    picture: bytes | np.ndarray  # an encoded file, or [H,W,3] uint8
    captions: tuple[str, ...]  # one at least; none is empty but in a source without any


class Index(NamedTuple):
    """What is known of a source's N samples without decoding them."""

    names: list  # [N] str
    sizes: np.ndarray  # [N,2] int32, (height, width) in px
    original: np.ndarray  # [N,2] int32, the same before the set's makers resized it
    scores: np.ndarray  # [N,3] float32 in the order of SCORES; nan where nothing is said
    places: np.ndarray  # [N,k] int64, where the source finds the sample
    broken: list  # [(name, reason, detail)] of samples that cannot be used
    cut: list  # [(file, why)] of files that could not be read to their end
    repeats: int  # samples whose key came before in the same file
    files: int = 1
    passed: list = ()  # [(name, reason, detail)] of files that are passed over
    stamp: str = ''  # of the files' sizes and dates; '': not known


class Broken(Exception):
    """A sample that cannot be used; `reason` is what it is counted under."""

    def __init__(self, reason, detail=''):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Drops:
    """Samples left out, counted by reason, each with its first example."""

    def __init__(self):
        self.counts, self.first = {}, {}

    def add(self, reason, name, detail='', n=1):
        """n samples, of which `name` is the first."""
        self.counts[reason] = self.counts.get(reason, 0) + n
        self.first.setdefault(reason, f'{name}: {detail}' if detail else name)

    def __len__(self):
        return sum(self.counts.values())

    def check(self, name, whole, max_dropped):
        """Raise InputError with the table if they are more than that share of them and the `whole`."""
        total = whole + len(self)
        if len(self) > max_dropped * total:
            raise InputError(
                f'{name}: {len(self)} of {total} samples are broken, more than max_dropped = '
                f'{max_dropped} of them: {self}'
            )

    def __str__(self):
        """One reason: one line; more of them: a table, a line each."""
        order = sorted(self.counts, key=self.counts.get, reverse=True)
        rows = [f'{self.counts[r]:,} {r} (first: {self.first[r]})' for r in order]
        return rows[0] if len(rows) == 1 else ''.join(f'\n  {row}' for row in rows)


def index_of(rows, broken=(), cut=(), repeats=0, **more):
    """[(name, size, original, scores, place)] -> Index."""
    names, sizes, original, scores, places = zip(*rows, strict=True) if rows else ((),) * 5
    return Index(
        list(names),
        np.array(sizes, np.int32).reshape(-1, 2),
        np.array(original, np.int32).reshape(-1, 2),
        np.array(scores, np.float32).reshape(-1, len(SCORES)),
        np.array(places, np.int64).reshape(len(names), -1 if names else 0),
        list(broken),
        list(cut),
        repeats,
        **more,
    )


def row(name, place, picture, parts, meta, caption):
    """A sample's row of the index. Raises Broken if its caption or picture is no good.

    picture: an open file, or (height, width); parts, meta and caption as in `captions_of`. Sizes
    that img2dataset wrote into `meta` are those of the pictures as they lie in the file. They are
    believed where it also noted that the file had no orientation, so that most pictures need not be
    looked into.
    """
    captions_of(caption, parts, meta)
    size, original = pair(meta, 'height', 'width'), pair(meta, 'original_height', 'original_width')
    if isinstance(picture, tuple):
        size = size or picture
    elif not size or 'Orientation' in str(meta.get('exif') or 'Orientation'):
        size, turned = header(picture)
        original = original[::-1] if original and turned else original
    scores = [
        next((number(meta[key]) for key in keys if meta.get(key) is not None), np.nan)
        for keys in SCORES.values()
    ]
    return name, size, original or size, scores, place


def pair(meta, *keys):
    values = tuple(number(meta.get(key)) for key in keys)
    return tuple(map(int, values)) if all(1 <= v < 2**31 for v in values) else None


def number(value):
    """A number of a JSON file -> float; nan if it is none."""
    try:
        return float(value) if isinstance(value, (int, float, np.number)) else np.nan
    except OverflowError:  # of hundreds of digits
        return np.nan


def captions_of(field, parts, meta):
    """The captions of a sample -> (str, ...).

    parts: {extension: bytes} of the sample's text files; meta: its JSON, or its features. 'txt' also
    finds a field that is named text, caption or captions; several captions (COCO) are all given.
    Raises Broken.
    """
    names = (field, 'text', 'caption', 'captions') if field == 'txt' else (field,)
    found = next(
        (x[name] for x in (parts, meta) for name in names if x.get(name) is not None), None
    )
    if found is None:
        raise Broken('no caption', f'no {field!r} among {", ".join([*parts, *meta]) or "nothing"}')
    try:
        texts = tuple(text for text in (t.strip() for t in strings(found)) if text)
        ''.join(texts).encode()  # JSON may hold half of a surrogate pair
    except UnicodeError as e:
        raise Broken('caption is not UTF-8', str(e)) from e
    if not texts:
        raise Broken('empty caption')
    return texts


def strings(value):
    """Text in any of the forms that sets hold it in -> its strings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode('utf-8-sig')  # without a byte order mark
    elif isinstance(value, dict):
        yield from strings(value.get('text', value.get('raw', ())))
    elif isinstance(value, (list, tuple, np.ndarray)):
        for item in value:
            yield from strings(item)


def header(file):
    """An open picture file -> (height, width) upright, whether it lies turned by a quarter; Broken."""
    try:
        picture = Image.open(file, formats=FORMATS)
        turned = orientation(picture) >= 5
    except InputError:  # of a remote file: it says nothing about the picture
        raise
    except Exception as e:  # PIL raises errors of many kinds for files that are no good pictures
        raise Broken('picture cannot be read', describe(e)) from e
    return picture.size if turned else picture.size[::-1], turned


def size_of(file):
    """An open picture file -> (height, width) from its header. Raises Broken."""
    return header(file)[0]


def orientation(picture):
    """How it lies, 1 upright; without decoding it, as `getexif` alone would do with a PNG.

    What is no number of EXIF's, 1..8, says nothing: 1.
    """
    said = picture.getexif().get(ORIENTATION) if 'exif' in picture.info else 1
    return said if isinstance(said, int) and 1 <= said <= 8 else 1


def decode(picture, ground='white'):
    """Raw.picture -> PIL image, RGB, upright, on that ground where it is transparent. Raises Broken."""
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] not in (1, 3):
            raise Broken('picture cannot be read', f'shape {picture.shape}')
        return Image.fromarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
    try:
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
        return rgb(ImageOps.exif_transpose(image) if orientation(image) > 1 else image, ground)
    except Exception as e:  # as above
        raise Broken('picture cannot be read', describe(e)) from e


def describe(error):
    """An exception in one line, without the Python objects that PIL names."""
    return ' '.join(re.sub(r' <[^<>]*>$', '', str(error)).split()) or type(error).__name__
