"""What distillation trains and keeps, full against LoRA: the form of table 1 of the LCM-LoRA report.

    python tools/training_sizes.py                       # from abstract trees, in a minute
    python tools/training_sizes.py --models emoji --compile    # with the compiled step's temporaries

Parameters of the UNet, those that are trained, and GB on a device that holds all: the frozen base in
bfloat16 (emoji: float32), what is trained with its moments and average in float32. LoRA: rank 64
(emoji: 16) on the modules that LCM-LoRA adapts. --compile adds what one step of one sample on this
machine's devices needs besides.
"""

import argparse
from pathlib import Path

from lcm_jax import plan, sharding, step, workloads
from lcm_jax.flags import read
from lcm_jax.models import shapes
from lcm_jax.tree import count

CONFIGS = Path(__file__).parents[1] / 'configs'
MODELS = {  # name: config of its LoRA
    'sd15': 'sd15_lcm_lora',
    'ssd1b': 'ssd1b_lcm_lora',
    'sdxl': 'sdxl_lcm_lora',
    'emoji': 'emoji_lcm_lora',
}
FULL = {'trains': 'full', 'distill.target': 'ema', 'train.ema_decay': 0.95}


def program(name, changes, mesh):
    """-> step.Program, (height, width) px, UNetSpec."""
    changes = {'train.batch': 1, 'data.source': 'cache:x', **changes}
    config = read(CONFIGS / f'{MODELS[name]}.py', changes)
    model = workloads.sizes_of(config.model)
    return step.program(*model, config, mesh), (config.data.resolution,) * 2, model[0]['unet']


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--compile', action='store_true')
    args = parser.parse_args()
    mesh = sharding.make_mesh(data=1)
    titles = ['UNet', 'trained', 'share', 'frozen', 'trained', 'average', 'moments', 'kept in all']
    titles += ['temporaries'] if args.compile else []
    print('| | ' + ' | '.join(titles) + ' |\n' + '|---' * (len(titles) + 1) + '|')
    for name in args.models:
        for way, changes in (('full LCM', FULL), ('LCM-LoRA', {})):
            made, size, unet = program(name, changes, mesh)
            whole = count(shapes.unet_shapes(unet))
            trained = count(made.state.params)
            kept = [plan.held(x) / 1e9 for x in (made.frozen, *made.state[2:5])]
            cells = [f'{whole:,}', f'{trained:,}', f'{trained / whole:.3f}']
            cells += [f'{x:.3g} GB' for x in (*kept, sum(kept))]
            if args.compile:
                found = plan.report(workloads.training(made, size, mesh))
                cells.append(f'{found.memory["temporaries"] / 1e9:.3g} GB')
            print(f'| {name}, {way} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    main()
