"""Make the emoji data set: captioned 64x64 pictures in three styles, as webdataset tars.

The pictures and words come from five npm packages (licences: lcm_jax/emoji/data/LICENSES.md).
In an empty folder, run

    npm install --no-save --ignore-scripts emoji-datasource-google@15.1.2 \
        emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0 \
        fluentui-emoji-js@1.2.1 emojibase-data@17.0.0

and then, in the repository (2 minutes; needs the vocabulary that make_tokenizer.py names)

    python tools/emoji/make_data.py --packages FOLDER/node_modules --out lcm_jax/emoji/data

It writes STYLE-train.tar.gz and STYLE-heldout.tar.gz for the styles noto, twemoji and fluent. A sample
is KEY.webp and KEY.txt; KEY is the emoji's code points in lower-case hex without the variation
selector fe0f (`1f991`, `1f468-200d-1f4bb`), the same in the three styles. About 5 % of the keys,
the same in every style, are held out. The same Pillow gives the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from make_tokenizer import clip_tokenizer, full_vocabulary
from PIL import Image

STYLES = {'noto': 'noto emoji', 'twemoji': 'twemoji', 'fluent': 'fluent 3d emoji'}
SIZE = 64  # pixels
MAX_TOKENS = 30  # of a caption, with the start and end tokens
MAX_KEYWORDS = 6
HELDOUT_ONE_IN = 20
MIN_PSNR = 45.0  # dB; a smaller file is accepted only above it
# The Fluent package has Microsoft's first drawings of these, which show trademarks (Clippy, the
# Windows logo, an Xbox controller) and are not in Microsoft's MIT release; emojiData.json lists
# the keys because the release has other drawings of them since.
NOT_RELEASED = {'1f4ce', '1f3ae'} | {f'{who}-200d-1f4bb' for who in ('1f468', '1f469', '1f9d1')}


def read_json(path):
    return json.loads(path.read_text(encoding='utf-8'))


def key_of(code):
    """'0023-FE0F-20E3' -> '0023-20e3': one key for an emoji in every package."""
    return '-'.join(point for point in code.lower().split('-') if point != 'fe0f')


def digest(word):
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], 'big')


def is_heldout(key):
    return digest(f'split {key}') % HELDOUT_ONE_IN == 0


def base_emoji(packages, name):
    """{key: row} of a datasource package, without skin tones, components and country flags."""
    rows = read_json(packages / f'emoji-datasource-{name}' / 'emoji.json')
    rows = sorted(rows, key=lambda row: row['sort_order'])
    return {
        key_of(row['unified']): row
        for row in rows
        if row['category'] != 'Component' and row['subcategory'] != 'country-flag'
    }


def picture_paths(packages):
    """{style: {key: path}}, in the emoji's usual order."""
    paths = {}
    for style, name in (('noto', 'google'), ('twemoji', 'twitter')):
        folder = packages / f'emoji-datasource-{name}' / 'img' / name / str(SIZE)
        paths[style] = {
            key: folder / row['image']
            for key, row in base_emoji(packages, name).items()
            if row[f'has_img_{name}']
        }
    released = {
        key_of(row['unicode'].replace(' ', '-'))
        for row in read_json(packages / 'fluentui-emoji-js' / 'emojiData.json')
        if '3D' in row['emojiStyles']
    }
    folder = packages / '@lobehub' / 'fluent-emoji-3d' / 'assets'
    files = {key_of(path.stem): path for path in sorted(folder.glob('*.webp'))}
    base = base_emoji(packages, 'twitter')
    usable = (released & files.keys()) - NOT_RELEASED
    paths['fluent'] = {key: files[key] for key in base if key in usable}
    return paths


def words_of(packages):
    """{key: [label, keyword, ...]}; keywords of one letter or only digits say nothing."""
    words = {}
    for row in read_json(packages / 'emojibase-data' / 'en' / 'data.json'):
        tags = [tag for tag in row.get('tags', []) if len(tag) > 1 and not tag.isdigit()]
        tags = [tag for tag in tags if tag != row['label']]
        words[key_of(row['hexcode'])] = [row['label'], *tags[:MAX_KEYWORDS]]
    return words


def caption_of(words, style, tokenizer):
    """'label, keyword, ..., style', with as many keywords as MAX_TOKENS allows."""
    for n in range(len(words), 0, -1):
        caption = ', '.join([*words[:n], STYLES[style]])
        if len(tokenizer(caption).input_ids) <= MAX_TOKENS:
            return caption
    raise ValueError(f'the label alone is longer than {MAX_TOKENS} tokens: {words[0]!r}')


def load_picture(path):
    """The picture on white, RGB, 64x64."""
    with Image.open(path) as picture:
        picture = picture.convert('RGBA')
    white = Image.new('RGBA', picture.size, 'white')
    picture = Image.alpha_composite(white, picture).convert('RGB')
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return picture


def psnr(a, b):
    """Peak signal-to-noise ratio in dB; 99 for equal pictures."""
    mse = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return min(99.0, 10 * np.log10(255**2 / mse)) if mse else 99.0


def rounded(picture, step):
    """Every channel to the nearest multiple of `step` below white, so that white stays white."""
    below = 255 - np.asarray(picture, np.int32)
    return Image.fromarray((255 - (below + step // 2) // step * step).clip(0).astype(np.uint8))


def paletted(picture, colours):
    """The picture in an adaptive palette, without dithering."""
    method, dither = Image.Quantize.MEDIANCUT, Image.Dither.NONE
    return picture.quantize(colours, method, kmeans=3, dither=dither).convert('RGB')


def encode(picture):
    """The smallest lossless WebP among coarser pictures that keep MIN_PSNR -> bytes, PSNR.

    Palettes suit flat drawings; rounding suits smooth ones, which WebP predicts from neighbours.
    Method 4: method 6 is no smaller on these pictures.
    """
    coarser = [paletted(picture, n) for n in (256, 128)]
    coarser += [rounded(picture, step) for step in (2, 4, 5)]
    best = None
    for candidate in (picture, *coarser):
        quality = psnr(picture, candidate)
        if quality < MIN_PSNR:
            continue
        stream = io.BytesIO()
        candidate.save(stream, 'WEBP', lossless=True, method=4)
        if best is None or len(stream.getvalue()) < len(best[0]):
            best = stream.getvalue(), quality
    return best


def distinct(paths):
    """{key: picture} without exact repetitions of an earlier picture."""
    pictures, seen = {}, set()
    for key, path in paths.items():
        picture = load_picture(path)
        if (data := picture.tobytes()) not in seen:
            seen.add(data)
            pictures[key] = picture
    return pictures


def write_tar(path, samples):
    """samples: {key: (webp, caption)}; fixed metadata, keys mixed by a hash."""
    with (
        gzip.GzipFile(path, 'wb', mtime=0) as file,  # half of a bare tar would be headers
        tarfile.open(fileobj=file, mode='w', format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key in sorted(samples, key=lambda key: digest(f'order {key}')):
            for extension, data in zip(('webp', 'txt'), samples[key], strict=True):
                member = tarfile.TarInfo(f'{key}.{extension}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--packages', type=Path, required=True, help='a node_modules folder')
    parser.add_argument('--out', type=Path, required=True, help='folder for the tars')
    args = parser.parse_args()

    tokenizer = clip_tokenizer(*full_vocabulary(), max_length=77)
    words = words_of(args.packages)
    args.out.mkdir(parents=True, exist_ok=True)
    for style, paths in picture_paths(args.packages).items():
        splits, qualities = {'train': {}, 'heldout': {}}, []
        for key, picture in distinct(paths).items():
            webp, quality = encode(picture)
            caption = caption_of(words[key], style, tokenizer).encode()
            splits['heldout' if is_heldout(key) else 'train'][key] = webp, caption
            qualities.append(quality)
        print(f'{style}: PSNR mean {np.mean(qualities):.1f} min {min(qualities):.1f} dB')
        for split, samples in splits.items():
            path = args.out / f'{style}-{split}.tar.gz'
            write_tar(path, samples)
            pictures = sum(len(webp) for webp, _ in samples.values())
            print(
                f'  {path.name}: {len(samples)} samples, {pictures} bytes of pictures, '
                f'{path.stat().st_size} bytes in all'
            )


if __name__ == '__main__':
    main()
