"""The shipped teacher fine-tuned to the Fluent emoji: all of its UNet.

python -m lcm_jax.train --config=configs/emoji_finetune.py --workdir=runs/emoji_finetune
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.objective = 'denoise'
    c.trains = 'full'
    c.data.source = 'emoji:fluent'
    c.data.validation = 'emoji-heldout:fluent'
    c.data.cache = True
    c.train.steps = 1000
    c.train.lr = 3e-4
    c.train.caption_dropout = 0.1
    c.train.best = 'validation'
    c.preview.prompts = (
        'red heart, emotion, heart, love, red, fluent 3d emoji',
        'cat face, animal, cat, face, kitten, kitty, pet, fluent 3d emoji',
        'strawberry, berry, fruit, fluent 3d emoji',
        'avocado, food, fruit, fluent 3d emoji',
    )
    c.preview.sampler = 'dpm++'
    c.preview.steps = 25
    c.preview.guidance = 4.0
    c.export.name = 'fluent'
    c.export.weights = 'ema'
    return c
