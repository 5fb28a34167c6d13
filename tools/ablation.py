"""The LCM paper's ablations on the emoji: one choice changed at a time, all measured alike.

    python tools/ablation.py --workdir runs/ablation [--only skip solver] [--steps 400]

BASE is the reference script's choice, with a rank and a guidance for this teacher; the recipe of
configs/emoji_lcm_lora.py was chosen by the result. Trains a LoRA for each row and measures it in 1, 2,
4 and 8 steps; ends with ablation.md, a table a group. What is in the workdir already is not made again.
"""

import argparse
from pathlib import Path

from lcm_jax import evaluate, train
from lcm_jax.flags import read
from lcm_jax.tree import digest

CONFIGS = Path(__file__).parents[1] / 'configs'
BASE = {
    'train.lr': 1e-3,
    'lora.rank': 32,
    'distill.w': '2:4',
    'distill.skip': 0,
    'distill.huber_c': 0.001,
    'distill.target': 'student',
}
GROUPS = {  # what is varied: {row: settings over BASE}; {}: BASE itself
    'skip': {
        'k = 1': {'distill.solver_steps': 1000},
        'k = 5': {'distill.solver_steps': 200},
        'k = 10': {'distill.solver_steps': 100},
        'k = 20': {},
        'k = 50': {'distill.solver_steps': 20},
        'k = 100': {'distill.solver_steps': 10},
    },
    'solver': {
        'DDIM': {},
        'DPM-Solver': {'distill.solver': 'dpm'},
        'DPM-Solver++': {'distill.solver': 'dpm++'},
    },
    'guidance': {
        'w = 1:3': {'distill.w': '1:3'},
        'w = 2:4': {},
        'w = 3': {'distill.w': '3'},
        'w = 5:15 (script)': {'distill.w': 'script'},
    },
    'rank': {
        'rank 4': {'lora.rank': 4},
        'rank 16': {'lora.rank': 16},
        'rank 32': {},
        'rank 64': {'lora.rank': 64},
    },
    'loss': {
        'Huber, c = 0.001': {},
        'Huber, c = 0.1': {'distill.huber_c': 0.1},
        'l2': {'distill.distance': 'l2'},
    },
    'average': {
        'exported: average 0.98': {},
        'exported: the last': {'export.weights': 'params'},
        'target: average 0.98': {'distill.target': 'ema'},
    },
}


def trained(workdir, settings, steps):
    """-> LoRA file of a run, that is made unless it is there."""
    name = '-'.join(f'{k}={v}' for k, v in settings.items()).replace(':', '..') or 'base'
    settings = {**BASE, 'train.steps': steps, 'train.save_every': steps, **settings}
    config = read(CONFIGS / 'emoji_lcm_lora.py', settings)
    folder = Path(workdir) / f'{name}-{digest({}, config.to_dict())}'
    file = folder / 'lcm_lora.safetensors'
    if not file.is_file():
        train.run(config, folder)
    return file


def label(row, settings):
    return row if settings else 'base'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', default='runs/ablation')
    parser.add_argument('--only', nargs='+', choices=GROUPS, default=list(GROUPS))
    parser.add_argument('--steps', type=int, default=400, help='of each run; default: 400')
    parser.add_argument('--count', type=int, default=512, help='pictures of each cell')
    args = parser.parse_args()
    groups = {
        group: {
            row: (label(row, settings), trained(args.workdir, settings, args.steps))
            for row, settings in GROUPS[group].items()
        }
        for group in args.only
    }
    loras = dict(pair for rows in groups.values() for pair in rows.values())
    ways = [{'label': 'teacher', 'sampler': 'ddim', 'steps': 50, 'guidance': 4.0}]
    ways += [{'label': k, 'sampler': 'lcm', 'lora': str(file)} for k, file in loras.items()]
    config = read(CONFIGS / 'eval_emoji.py', {})
    config.ways = tuple(ways)
    config.sets = (('training captions', 'emoji:noto,twemoji', args.count),)
    rows = evaluate.run(config, Path(args.workdir) / 'eval')['sets'][0]['rows']
    found = {(r['label'], r['steps']): r for r in rows}
    lines = []
    for group, members in groups.items():
        lines += ['', f'| {group} | FID 1 | 2 | 4 | 8 | CLIP 1 | 2 | 4 | 8 |', '|---' * 9 + '|']
        for row, (name, _) in members.items():
            cells = [
                f'{found[name, n][key]:.{digits}f}'
                for key, digits in (('fid', 2), ('clip', 1))
                for n in config.steps
            ]
            lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    text = '\n'.join(lines[1:]) + '\n'
    (Path(args.workdir) / 'ablation.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main()
