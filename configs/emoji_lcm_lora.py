"""LCM-LoRA of the shipped emoji teacher.

python -m lcm_jax.train --config=configs/emoji_lcm_lora.py --workdir=runs/emoji_lcm_lora
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.data.source = 'emoji:noto,twemoji'
    c.data.cache = True
    c.lora.rank = 16
    c.distill.w = '2:4'
    c.distill.skip = 40
    c.distill.huber_c = 0.1
    c.distill.target = 'ema'
    c.train.steps = 800
    c.train.lr = 5e-4
    c.train.decay = True
    c.train.ema_decay = 0.98
    c.export.name = 'lcm_lora'
    c.export.weights = 'ema'
    return c
