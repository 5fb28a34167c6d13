"""Latent consistency fine-tuning of the shipped emoji UNet on its pictures, without a teacher.

python -m lcm_jax.train --config=configs/emoji_lcf.py --workdir=runs/emoji_lcf
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.objective = 'lcf'
    c.trains = 'full'
    c.data.source = 'emoji:noto,twemoji'
    c.data.cache = True
    c.distill.target = 'ema'
    c.train.steps = 1000
    c.train.lr = 2e-4
    c.train.decay = True
    c.export.name = 'lcf'
    c.export.weights = 'ema'
    return c
