"""Curves of runs, side by side.

    python tools/curves.py runs/emoji_lcm_lora runs/emoji_lcf --out curves.png

A column per run: the loss (each report, and a running mean of
nine), then what was measured at the checkpoints.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

from lcm_jax.logs import read_metrics

MEASURED = ('distance', 'changed', 'validation')  # at checkpoints, see lcm_jax/preview.py


def running_mean(values, n=9):
    """[N] -> [N], each the mean of the n around it that there are."""
    ones = np.ones(min(n, len(values)))
    return np.convolve(values, ones, 'same') / np.convolve(np.ones(len(values)), ones, 'same')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('workdirs', nargs='+')
    parser.add_argument('--out', default='curves.png')
    args = parser.parse_args()
    size = (3.2 * len(args.workdirs), 4.6)
    figure, axes = plt.subplots(2, len(args.workdirs), figsize=size, sharex='col', squeeze=False)
    for workdir, (above, below) in zip(args.workdirs, axes.T, strict=True):
        found = read_metrics(workdir)
        steps, losses = found['loss']
        above.plot(steps, losses, color='0.8', linewidth=1)
        above.plot(steps, running_mean(losses), color='C0')
        above.set(title=Path(workdir).name, ylim=(0, None))
        for name in MEASURED:
            if name in found:
                below.plot(*found[name], marker='.', label=name)
        below.set(xlabel='step', ylim=(0, None))
        below.legend(fontsize='small')
    axes[0][0].set_ylabel('loss')
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
