"""The shipped teacher fine-tuned to the Fluent emoji: all of its UNet. Otherwise as the style LoRA.

python -m lcm_jax.train --config=configs/emoji_finetune.py --workdir=runs/emoji_finetune
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('emoji_style_lora.py')))['get_config']()
    c.trains = 'full'
    c.train.steps = 900
    c.train.lr = 5e-4
    c.export.name = 'fluent'
    c.export.weights = 'ema'
    return c
