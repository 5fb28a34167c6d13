"""LCM-LoRA of the shipped emoji teacher.

python -m lcm_jax.train --config=configs/emoji_lcm_lora.py --workdir=runs/emoji_lcm_lora
"""

import importlib.util
from pathlib import Path


def get_config():
    spec = importlib.util.spec_from_file_location('default', Path(__file__).with_name('default.py'))
    default = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(default)
    c = default.get_config()
    c.lora.rank = 32
    c.lora.alpha = 32.0
    c.distill.w_min = 2.0
    c.distill.w_max = 4.0
    c.train.steps = 1500
    c.train.batch = 16
    c.train.lr = 1e-3
    c.train.warmup = 50
    c.train.decay = True
    c.train.ema_decay = 0.98
    c.export.weights = 'ema'
    return c
