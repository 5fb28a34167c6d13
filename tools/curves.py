"""Curves of runs, and what they drew last, side by side.

    python tools/curves.py runs/emoji_lcm_lora runs/emoji_lcf --out curves.png --previews previews.png

A column of curves per run: the loss (each report, and a running mean of nine), then what was measured
at the checkpoints.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lcm_jax.grid import strip
from lcm_jax.logs import read_metrics

MEASURED = ('distance', 'changed', 'validation')  # at checkpoints, see lcm_jax/preview.py


def running_mean(values, n=9):
    """[N] -> [N], each the mean of the n around it that there are."""
    ones = np.ones(min(n, len(values)))
    return np.convolve(values, ones, 'same') / np.convolve(np.ones(len(values)), ones, 'same')


def curves(workdirs, file):
    """Write the plots of the runs."""
    size = (3.2 * len(workdirs), 4.6)
    figure, axes = plt.subplots(
        2, len(workdirs), figsize=size, sharex='col', squeeze=False, layout='constrained'
    )
    lines = {}
    for workdir, (above, below) in zip(workdirs, axes.T, strict=True):
        found = read_metrics(workdir)
        steps, losses = found['loss']
        above.plot(steps, losses, color='0.8', linewidth=1)
        above.plot(steps, running_mean(losses), color='C0')
        above.set(title=Path(workdir).name, ylim=(0, None))
        for i, name in enumerate(MEASURED):
            if name in found:
                (lines[name],) = below.plot(*found[name], marker='.', color=f'C{i}')
        below.set(xlabel='step', ylim=(0, None))
    axes[0][0].set_ylabel('loss')
    figure.legend(lines.values(), lines, loc='outside lower center', ncols=len(lines))
    figure.savefig(file, dpi=110)
    print(f'wrote {file}')


def last_preview(workdir, head=24):
    """The preview of a run's last checkpoint, below the run's name."""
    picture = Image.open(max(Path(workdir, 'preview').glob('*.png')))
    out = Image.new('RGB', (picture.width, picture.height + head), 'white')
    out.paste(picture, (0, head))
    ImageDraw.Draw(out).text(
        (out.width // 2, head // 2), Path(workdir).name, 'black', ImageFont.load_default(15), 'mm'
    )
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('workdirs', nargs='+')
    parser.add_argument('--out', default='curves.png')
    parser.add_argument('--previews', help='file for what the runs drew last')
    args = parser.parse_args()
    curves(args.workdirs, args.out)
    if args.previews:
        strip([last_preview(workdir) for workdir in args.workdirs], columns=3).save(args.previews)
        print(f'wrote {args.previews}')


if __name__ == '__main__':
    main()
