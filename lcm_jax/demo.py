"""The main job on a laptop: distil an LCM-LoRA from the emoji teacher and draw in four steps."""

import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lcm_jax.data.emoji import emoji
from lcm_jax.errors import InputError
from lcm_jax.evaluate import BATCH, Cell, Features, markdown, table
from lcm_jax.grid import grid, pixels
from lcm_jax.lora_files.files import write_lora
from lcm_jax.pipeline import Pipeline
from lcm_jax.train import distil, encode, recipe

# A short form of configs/emoji_lcm_lora.py: under four minutes on two cores at 400 steps.
RECIPE = {
    'rank': 16,
    'alpha': 16.0,
    'targets': '',
    'solver_steps': 50,
    'w_min': 2.0,
    'w_max': 4.0,
    'distance': 'huber',
    'huber_c': 0.001,
    'target': 'student',
    'batch': 16,
    'lr': 1e-3,
    'decay': True,
    'weight_decay': 0.0,
    'clip': 1.0,
    'ema_decay': 0.98,
    'seed': 0,
    'data_seed': 0,
    'log_every': 10,
    'save_every': 100,
    'weights': 'ema',
}
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
    """Distil for `steps`, export, reload, compare, and write grid.png and report.md into `out`."""
    out = Path(out)
    teacher = Pipeline.load('emoji')
    samples = emoji('train', ('noto', 'twemoji'))
    print(f'1/4 encoding {len(samples)} captioned pictures')
    cache = encode(teacher, samples)

    print('2/4 distilling an LCM-LoRA from the teacher')
    start = time.perf_counter()
    lora = distil(teacher, cache, steps=steps, warmup=steps // 20, workdir=out / 'train', **RECIPE)
    print(f'    took {time.perf_counter() - start:.0f} s')

    print('3/4 exporting, and reading the file back')
    file = out / 'lcm_lora.safetensors'
    loras = {'unet': lora}
    write_lora(file, loras, teacher.params, alpha=RECIPE['alpha'], metadata=recipe(RECIPE))
    fresh = Pipeline.load('emoji')
    fresh.add_lora(file, name='lcm')
    same(teacher.with_lora(loras), fresh, file)

    print('4/4 drawing and measuring')
    shipped = Pipeline.load('emoji')
    shipped.add_lora('lcm')
    cells = ways(teacher, fresh, shipped)
    heldout = emoji('heldout', ('noto', 'twemoji'))
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
        Features(teacher),
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


def same(live, loaded, file):
    """The exported file draws what the live adapter draws, to fp16 rounding; InputError if not."""
    a, b = (
        pixels(p(list(PROMPTS), steps=4, sampler='lcm', guidance=1.0)).astype(float)
        for p in (live, loaded)
    )
    psnr = 10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9))
    if psnr < 35:
        raise InputError(f'{file} draws other pictures than the adapter in memory ({psnr:.1f} dB)')
    print(f'    the file draws what the live adapter draws: {psnr:.1f} dB')
