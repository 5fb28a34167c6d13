"""Style LoRA: the Fluent emoji, for the shipped teacher, which has never seen one.

python -m lcm_jax.train --config=configs/emoji_style_lora.py --workdir=runs/emoji_style_lora
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.objective = 'denoise'
    c.data.source = 'emoji:fluent'
    c.data.validation = 'emoji-heldout:fluent'
    c.data.cache = True
    c.distill.min_snr = 5.0
    c.train.steps = 1200
    c.train.batch = 32
    c.train.lr = 1e-3
    c.train.decay = True
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
    return c
