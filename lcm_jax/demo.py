"""The main job on a laptop: distil an LCM-LoRA from the emoji teacher and draw in four steps."""

import shutil
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lcm_jax.data.emoji import emoji
from lcm_jax.evaluate import BATCH, Cell, markdown, table
from lcm_jax.features import open_features
from lcm_jax.grid import grid
from lcm_jax.pipeline import Pipeline
from lcm_jax.train import parse, run

CONFIG = Path(__file__).parents[1] / 'configs' / 'emoji_lcm_lora.py'
RANK = 16  # half of the config's: under four minutes on two cores at 400 steps
GUIDANCE = 4.0  # of the teacher
STEPS = (1, 2, 4, 8)
PROMPTS = (
    'red heart, emotion, heart, love, red, noto emoji',
    'cat face, animal, cat, face, kitten, kitty, pet, twemoji',
    'strawberry, berry, fruit, noto emoji',
    'a purple heart, twemoji',
)
HELDOUT = 4  # rows of the grid with captions of held-out emoji


def ways(teacher, fresh, shipped):
    """The columns of the grid and rows of the table."""
    cells = [Cell('teacher\nDDIM 50', teacher, 'ddim', 50, GUIDANCE)]
    cells += [
        Cell(f'{label}\n{n}', pipe, sampler, n, guidance)
        for label, pipe, sampler, guidance in (
            ('DDIM', teacher, 'ddim', GUIDANCE),
            ('DPM-Solver++', teacher, 'dpm++', GUIDANCE),
            ('LCM-LoRA', fresh, 'lcm', 1.0),
        )
        for n in STEPS
    ]
    return [*cells, Cell('shipped\nLCM-LoRA 4', shipped, 'lcm', 4, 1.0)]


def demo(out, steps=400):
    """Distil for `steps`, load what was exported, and write grid.png and report.md into `out`.

    It needs a clone of the repository, for its config.
    """
    out = Path(out)
    start = time.perf_counter()
    print('1/3 distilling an LCM-LoRA from the teacher')
    file = out / 'lcm_lora.safetensors'
    shutil.copyfile(run(config(steps), out / 'train'), file)
    print(f'    took {time.perf_counter() - start:.0f} s')

    print('2/3 loading the file')
    teacher, fresh, shipped = (Pipeline.load('emoji') for _ in range(3))
    fresh.add_lora(file, name='lcm')
    shipped.add_lora('lcm')

    print('3/3 drawing and measuring')
    cells = ways(teacher, fresh, shipped)
    samples, heldout = (emoji(split, ('noto', 'twemoji')) for split in ('train', 'heldout'))
    prompts = [*PROMPTS, *(s.caption for s in heldout[:: len(heldout) // HELDOUT][:HELDOUT])]
    columns = [cell.draw(prompts, seed=0)[0] for cell in tqdm(cells, desc='grid')]
    grid(
        [*PROMPTS, *(f'{p} (held out)' for p in prompts[len(PROMPTS) :])],
        [c.label for c in cells],
        list(zip(*columns, strict=True)),
    ).save(out / 'grid.png')

    pick = np.random.default_rng(0).permutation(len(samples))
    n = len(heldout)
    rows = table(
        cells,
        open_features('emoji'),
        [samples[i] for i in pick[:n]],
        [samples[i] for i in pick[n : 2 * n]],
        progress=lambda x: tqdm(x, desc='table'),
    )
    report = markdown(rows)
    (out / 'report.md').write_text(f"""# What {steps} steps of distillation gave

{report}

{n} training captions, seed 0, guidance {GUIDANCE} for the teacher's samplers and 1 for LCM-LoRA. Features:
the shipped emoji CLIP. Fréchet distance to {n} other real pictures: the first row is what real pictures
reach, and with so few pictures all values are biased upwards; compare them with each other only.
Seconds are per picture in batches of {BATCH}, compiled program warm.
""")
    print(
        f'\n{report}\n\nwritten to {out}:\n'
        '  grid.png                the drawings, side by side\n'
        '  report.md               the table above\n'
        '  lcm_lora.safetensors    the LoRA, for diffusers, ComfyUI and A1111\n'
        f'  train/                  checkpoints and logs (tensorboard --logdir {out / "train"})\n\n'
        f'next: lcm-jax sample "a red heart, noto emoji" --lora {file} --steps 4 --count 4 --out hearts.png'
    )


def config(steps):
    """configs/emoji_lcm_lora.py in a short form."""
    settings = {
        'lora.rank': RANK,
        'train.steps': steps,
        'train.warmup': steps // 20,
        'train.log_every': 10,
        'train.save_every': 100,
    }
    settings = [f'--config.{key}={value}' for key, value in settings.items()]
    return parse([f'--config={CONFIG}', '--workdir=.', *settings])[0]
