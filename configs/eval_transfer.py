"""Transfer: the LCM-LoRA of the base teacher on the teacher's Fluent fine-tune, without training.

lcm-jax train --config configs/emoji_finetune.py --workdir runs/emoji_finetune
lcm-jax train --config configs/emoji_lcm_lora.py --workdir runs/emoji_lcm_lora_7.5 --config.distill.w=6.5
lcm-jax evaluate --config configs/eval_transfer.py --workdir runs/eval_transfer
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('eval_style.py')))['get_config']()
    c.title = 'LCM-LoRA on a fine-tuned model'
    c.model = 'runs/emoji_finetune/fluent'
    c.reference = 'fine-tune'
    c.ways = (
        {'label': 'fine-tune', 'sampler': 'ddim', 'steps': 50, 'guidance': 4.0},
        {'label': 'DDIM', 'sampler': 'ddim', 'guidance': (4.0, 7.5)},
        {'label': 'DPM-Solver++', 'sampler': 'dpm++', 'guidance': (4.0, 7.5)},
        {'label': "base's LCM-LoRA", 'sampler': 'lcm', 'lora': 'lcm'},
        {
            'label': "base's LCM-LoRA, w = 6.5",
            'sampler': 'lcm',
            'lora': 'runs/emoji_lcm_lora_7.5/lcm_lora.safetensors',
        },
    )
    return c
