"""Full LCM of the shipped emoji teacher: all of the UNet, told the guidance scale; EMA target.

python -m lcm_jax.train --config=configs/emoji_lcm_full.py --workdir=runs/emoji_lcm_full
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.trains = 'full'
    c.data.source = 'emoji:noto,twemoji'
    c.data.cache = True
    c.distill.w = '2:7'
    c.distill.skip = 40
    c.distill.huber_c = 0.1
    c.distill.target = 'ema'
    c.train.steps = 1000
    c.train.lr = 2e-4
    c.train.decay = True
    c.export.name = 'lcm'
    c.export.weights = 'ema'
    return c
