"""Style mixing, the LCM-LoRA report's figure 3: the Fluent style LoRA by many steps of DPM-Solver++, and with
the LCM-LoRA added, untrained together, by few steps of the LCM sampler.

lcm-jax train --config configs/emoji_lcm_lora.py --workdir runs/emoji_lcm_lora_7.5 --config.distill.w=6.5
lcm-jax evaluate --config configs/eval_style.py --workdir runs/eval_style
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('eval.py')))['get_config']()
    c.title = 'A style LoRA, alone and mixed with LCM-LoRA'
    many = (2, 4, 8, 16, 32)
    c.reference = 'style 1.0, DDIM 50'
    c.ways = (
        {
            'label': 'style 1.0, DDIM 50',
            'sampler': 'ddim',
            'steps': 50,
            'lora': 'fluent',
            'guidance': 4.0,
        },
        {'label': 'no style, DPM-Solver++', 'sampler': 'dpm++', 'steps': 32, 'guidance': 4.0},
        {
            'label': 'style 1.0, DDIM',
            'sampler': 'ddim',
            'steps': (2, 4, 8),
            'lora': 'fluent',
            'guidance': 4.0,
        },
        {
            'label': 'style 1.0, DDIM, guidance 7.5',
            'sampler': 'ddim',
            'steps': (2, 4, 8),
            'lora': 'fluent',
            'guidance': 7.5,
        },
        {
            'label': 'style 1.0, DPM-Solver++',
            'sampler': 'dpm++',
            'steps': many,
            'lora': 'fluent',
            'guidance': 4.0,
        },
        {
            'label': 'style 1.0, DPM-Solver++, guidance 7.5',
            'sampler': 'dpm++',
            'steps': (2, 4, 8),
            'lora': 'fluent',
            'guidance': 7.5,
        },
        {
            'label': 'style 0.8 + LCM 1.0',
            'sampler': 'lcm',
            'steps': (1, 2, 4, 8),
            'lora': 'fluent:0.8 + lcm:1.0',
        },
        {
            'label': 'style 1.0 + LCM 1.0',
            'sampler': 'lcm',
            'steps': (1, 2, 4, 8),
            'lora': 'fluent:1.0 + lcm:1.0',
        },
        {
            'label': 'style 1.0 + LCM 1.0, w = 6.5',
            'sampler': 'lcm',
            'steps': (1, 2, 4, 8),
            'lora': 'fluent:1.0 + runs/emoji_lcm_lora_7.5/lcm_lora.safetensors',
        },
    )
    c.sets = (('Fluent captions', 'emoji:fluent', 512),)
    c.real = 'emoji:fluent'
    c.prompts = (
        'red heart, emotion, heart, love, red, fluent 3d emoji',
        'cat face, animal, cat, face, kitten, kitty, pet, fluent 3d emoji',
        'strawberry, berry, fruit, fluent 3d emoji',
        'airplane, aeroplane, fly, flying, jet, plane, travel, fluent 3d emoji',
        'robot, face, monster, fluent 3d emoji',
    )
    return c
