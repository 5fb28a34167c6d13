"""LCM-LoRA of SSD-1B at 1024 px, from a cache of latents (`lcm-jax data cache`).

python -m lcm_jax.train --config=configs/ssd1b_lcm_lora.py --workdir=runs/ssd1b_lcm_lora \
    --config.data.source=cache:DIR
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.model = 'segmind/SSD-1B'
    c.dtype = 'bfloat16'
    c.data.source = 'cache:data/ssd1b'
    c.data.resolution = 1024
    c.distill.w = 'script_sdxl'
    c.train.steps = 2000
    c.train.lr = 1e-4
    c.train.warmup = 100
    c.train.remat = 'blocks'
    c.train.ema_decay = 0.0
    c.train.save_every = 500
    c.preview.teacher_guidance = 7.5
    c.preview.prompts = ('a photo of a red panda on a branch', 'an oil painting of a lighthouse')
    c.export.name = 'lcm_lora_ssd1b'
    return c
