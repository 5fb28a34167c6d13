"""Style LoRA of Stable Diffusion 1.5, from a folder of pictures: NAME.png with its caption in NAME.txt.

lcm-jax train --config configs/sd15_style_lora.py --workdir runs/style --config.data.source=folder:PICTURES

Drawn in four steps with an LCM-LoRA beside it; 10 to 100 pictures and 1,000 steps are usual.
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name('default.py')))['get_config']()
    c.model = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
    c.dtype = 'bfloat16'
    c.objective = 'denoise'
    c.data.source = 'folder:pictures'
    c.data.resolution = 512
    c.data.cache = True
    c.distill.min_snr = 5.0
    c.train.best = ''
    c.train.batch = 4
    c.preview.prompts = ('a photo of a red panda on a branch', 'an oil painting of a lighthouse')
    c.preview.sampler, c.preview.steps = 'dpm++', 25
    c.preview.guidance = c.preview.teacher_guidance = 7.5
    c.export.name = 'style'
    return c
