"""Table 1 of the LCM paper on the emoji: DDIM, DPM-Solver, DPM-Solver++, LCM and LCM-LoRA in few steps.

lcm-jax train --config configs/emoji_lcm_full.py --workdir runs/emoji_lcm_full
lcm-jax evaluate --config configs/eval_emoji.py --workdir runs/eval_emoji
"""

import runpy
from pathlib import Path

TEACHER = {'guidance': 4.0}


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('eval.py')))['get_config']()
    c.title = 'The emoji teacher in few steps'
    c.reference = 'teacher'
    c.ways = (
        {'label': 'teacher', 'sampler': 'ddim', 'steps': 50, **TEACHER},
        {'label': 'DDIM', 'sampler': 'ddim', **TEACHER},
        {'label': 'DDIM, trailing', 'sampler': 'ddim', 'spacing': 'trailing', **TEACHER},
        {'label': 'DPM-Solver', 'sampler': 'dpm', **TEACHER},
        {'label': 'DPM-Solver++', 'sampler': 'dpm++', **TEACHER},
        {'label': 'LCM-LoRA', 'sampler': 'lcm', 'lora': 'lcm'},
        {'label': 'LCM, full', 'sampler': 'lcm', 'model': 'runs/emoji_lcm_full/lcm', **TEACHER},
    )
    c.sets = (
        ('training captions', 'emoji:noto,twemoji', 1024),
        ('held-out captions', 'emoji-heldout:noto,twemoji', 0),
    )
    c.real = 'emoji:noto,twemoji'
    c.prompts = (
        'red heart, emotion, heart, love, red, noto emoji',
        'cat face, animal, cat, face, kitten, kitty, pet, twemoji',
        'strawberry, berry, fruit, noto emoji',
        'purple heart, bestest, emotion, heart, ily, love, purple, twemoji',
        'airplane, aeroplane, fly, flying, jet, plane, travel, noto emoji',
        'robot, face, monster, twemoji',
    )
    return c
