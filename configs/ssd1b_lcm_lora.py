"""LCM-LoRA of SSD-1B at 1024 px, from a cache of latents (`lcm-jax data cache`): SDXL's recipe.

python -m lcm_jax.train --config=configs/ssd1b_lcm_lora.py --workdir=runs/ssd1b_lcm_lora \
    --config.data.source=cache:DIR
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('sdxl_lcm_lora.py')))['get_config']()
    c.model = 'segmind/SSD-1B'
    c.data.source = 'cache:data/ssd1b'
    c.export.name = 'lcm_lora_ssd1b'
    return c
