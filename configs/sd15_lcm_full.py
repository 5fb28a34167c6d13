"""Full LCM of Stable Diffusion 1.5: w-conditioned, EMA target.

python -m lcm_jax.train --config=configs/sd15_lcm_full.py --workdir=runs/sd15_lcm_full \
    --config.data.source="wds:gs://BUCKET/laion/{00000..00999}.tar"
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.model = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
    c.dtype = 'bfloat16'
    c.trains = 'full'
    c.data.source = 'wds:data/{00000..00009}.tar'
    c.data.resolution = 512
    c.distill.target = 'ema'
    c.train.steps = 10_000
    c.train.batch = 64
    c.train.lr = 1e-6
    c.train.remat = 'blocks'
    c.train.save_every = 1000
    c.preview.teacher_guidance = 7.5
    c.preview.prompts = ('a photo of a red panda on a branch', 'an oil painting of a lighthouse')
    c.export.name = 'lcm_sd15'
    c.export.weights = 'ema'
    return c
