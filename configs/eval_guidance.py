"""Table 1 at the guidance that Stable Diffusion is used with: solvers at 7.5, LCMs that were taught it.

lcm-jax train --config configs/emoji_lcm_lora.py --workdir runs/emoji_lcm_lora_7.5 --config.distill.w=6.5
lcm-jax train --config configs/emoji_lcm_full.py --workdir runs/emoji_lcm_full
lcm-jax evaluate --config configs/eval_guidance.py --workdir runs/eval_guidance
"""

import runpy
from pathlib import Path

TEACHER = {'guidance': 7.5}


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('eval_emoji.py')))['get_config']()
    c.title = 'The emoji teacher in few steps, at guidance 7.5'
    c.ways = (
        {'label': 'teacher', 'sampler': 'ddim', 'steps': 50, **TEACHER},
        {'label': 'DDIM', 'sampler': 'ddim', **TEACHER},
        {'label': 'DDIM, trailing', 'sampler': 'ddim', 'spacing': 'trailing', **TEACHER},
        {'label': 'DPM-Solver++', 'sampler': 'dpm++', **TEACHER},
        {
            'label': 'LCM-LoRA, w = 6.5',
            'sampler': 'lcm',
            'lora': 'runs/emoji_lcm_lora_7.5/lcm_lora.safetensors',
        },
        {'label': 'LCM, full', 'sampler': 'lcm', 'model': 'runs/emoji_lcm_full/lcm', **TEACHER},
        {'label': 'LCM-LoRA, w = 2:4', 'sampler': 'lcm', 'lora': 'lcm'},
    )
    c.sets = (('training captions', 'emoji:noto,twemoji', 1024),)
    return c
