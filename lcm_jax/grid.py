"""Labelled picture grids."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lcm_jax.atomic import whole


def grid(rows, columns, cells, *, notes=None, tile=96, margin=8, label_width=190, font_size=13):
    """rows [R] str, columns [C] str (may hold newlines), cells [R][C] PIL images -> one picture.

    The cells have the shape of the first. notes: [R][C] str, written below them. tile: their width, px.
    """
    tall = round(tile * cells[0][0].height / cells[0][0].width)
    font = ImageFont.load_default(font_size)
    longest = max(font.getlength(word) for c in columns for word in c.split())
    # Each word within its column.
    small = ImageFont.load_default(font_size * min(1, tile / longest))
    columns = [wrap(c, tile, small) for c in columns]
    head = margin + max(c.count('\n') + 1 for c in columns) * (font_size + 4)
    pitch = tall + margin + (font_size + 2 if notes else 0)
    size = label_width + len(columns) * (tile + margin), head + len(rows) * pitch + margin
    out = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(out)
    for j, name in enumerate(columns):
        x = label_width + j * (tile + margin) + tile // 2
        draw.multiline_text(
            (x, head - 4), name, 'black', small, anchor='md', align='center', spacing=2
        )
    for i, name in enumerate(rows):
        y = head + i * pitch
        draw.multiline_text(
            (margin, y + tall // 2),
            wrap(name, label_width - 2 * margin, font),
            'black',
            font,
            anchor='lm',
            spacing=2,
        )
        for j, picture in enumerate(cells[i]):
            x = label_width + j * (tile + margin)
            out.paste(picture.resize((tile, tall), Image.Resampling.LANCZOS), (x, y))
            draw.rectangle((x, y, x + tile - 1, y + tall - 1), outline=(220, 220, 220))
            if notes:
                draw.text((x + tile // 2, y + tall + 2), notes[i][j], 'dimgrey', font, anchor='mt')
    return out


def wrap(text, width, font):
    """Break the lines of `text` at spaces into lines of at most `width` px."""
    lines = []
    for line in text.split('\n'):
        lines.append('')
        for word in line.split(' '):
            longer = f'{lines[-1]} {word}'.strip()
            if font.getlength(longer) > width and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
    return '\n'.join(lines)


def strip(pictures, columns=8, margin=4):
    """PIL images of one size -> a plain sheet of them, `columns` wide."""
    columns = min(columns, len(pictures))
    w, h = pictures[0].size
    n = -(-len(pictures) // columns)
    out = Image.new('RGB', (columns * (w + margin) + margin, n * (h + margin) + margin), 'white')
    for i, picture in enumerate(pictures):
        out.paste(
            picture, (margin + i % columns * (w + margin), margin + i // columns * (h + margin))
        )
    return out


def save(picture, file, **options):
    """Write a PIL image, whole or not at all. options: of PIL's `save`."""
    with whole(file) as part:
        picture.save(part, **options)


def pixels(pictures):
    """PIL images of one size -> [N,H,W,3] uint8."""
    return np.stack([np.asarray(p) for p in pictures])
