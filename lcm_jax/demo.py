"""The main job on a laptop: distil an LCM-LoRA from the emoji teacher, draw in few steps and measure."""

import shutil
import time
from pathlib import Path

from lcm_jax import evaluate, train
from lcm_jax.flags import read

CONFIGS = Path(__file__).parents[1] / 'configs'
COUNT = 160  # pictures that each way of drawing is measured by


def demo(out, steps=400):
    """Distil for `steps`, load what was exported, and write pictures and a report into `out`.

    It needs a clone of the repository, for its configs.
    """
    out = Path(out)
    start = time.perf_counter()
    print('1/2 distilling an LCM-LoRA from the teacher')
    file = out / 'lcm_lora.safetensors'
    shutil.copyfile(train.run(training(steps), out / 'train'), file)
    print(f'    took {time.perf_counter() - start:.0f} s')

    print('2/2 drawing and measuring')
    evaluate.run(evaluation(file, steps), out)
    report = (out / 'report.md').read_text()
    print(
        f'\n{report}\nwritten to {out}:\n'
        '  report.md               this report\n'
        '  grid.png                the drawings, side by side; quality-*.png: plots\n'
        '  lcm_lora.safetensors    the LoRA, for diffusers; ComfyUI and A1111 do not know this model\n'
        f'  train/                  checkpoints and logs (tensorboard --logdir {out / "train"})\n\n'
        f'next: lcm-jax sample "a red heart, noto emoji" --lora {file} --steps 4 --count 4 --out hearts.png'
    )


def training(steps):
    """configs/emoji_lcm_lora.py in a short form."""
    settings = {
        'train.steps': steps,
        'train.warmup': steps // 20,
        'train.log_every': 10,
        'train.save_every': 100,
    }
    return read(CONFIGS / 'emoji_lcm_lora.py', settings)


def evaluation(file, steps):
    """configs/eval_emoji.py in a short form, with the LoRA in the file."""
    config = read(CONFIGS / 'eval_emoji.py', {'paired': COUNT, 'batch': 16})
    fresh = {'label': 'LCM-LoRA', 'sampler': 'lcm', 'lora': str(file)}
    config.title = f'What {steps} steps of distillation gave'
    config.sets = (('training captions', 'emoji:noto,twemoji', COUNT),)
    config.ways = (
        *(way for way in config.ways if way['label'] in ('teacher', 'DDIM', 'DPM-Solver++')),
        fresh,
        {**fresh, 'label': 'shipped LCM-LoRA', 'lora': 'lcm', 'steps': 4},
    )
    return config
