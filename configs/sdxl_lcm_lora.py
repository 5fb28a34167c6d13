"""LCM-LoRA of SDXL at 1024 px, from a cache of latents (`lcm-jax data cache`).

python -m lcm_jax.train --config=configs/sdxl_lcm_lora.py --workdir=runs/sdxl_lcm_lora \
    --config.data.source=cache:DIR
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.model = 'stabilityai/stable-diffusion-xl-base-1.0'
    c.dtype = 'bfloat16'
    c.data.source = 'cache:data/sdxl'
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
    c.export.name = 'lcm_lora_sdxl'
    return c
