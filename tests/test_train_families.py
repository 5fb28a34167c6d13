"""A step of distillation of SDXL and SSD-1B, small and of random weights; diffusers loads the LoRA."""

import numpy as np
import pytest
import runs
import small

from lcm_jax.lora_files.files import read_lora
from lcm_jax.model import describe

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # ml_collections' own
    pytest.mark.usefixtures('quick_compiler'),
]


@pytest.mark.parametrize('model', ['sdxl', 'ssd1b'])
def test_a_step(model, tmp_path):
    theirs = small.build(model)
    theirs.save_pretrained(tmp_path / 'model')
    file = runs.run(
        tmp_path / 'model', tmp_path / 'run', train__steps=1, train__lr=0.01, train__warmup=0
    )
    (row,) = (x for x in runs.lines(tmp_path / 'run') if 'loss' in x)
    assert np.isfinite(row['loss']) and row['loss'] > 0 and row['skipped'] == 0
    bases = {'unet': describe(tmp_path / 'model').checkpoint.shapes('unet')}
    adapter = read_lora(file, bases)[0]['unet']
    # the first Adam step moves `up` from zero by the learning rate, wherever there is a gradient
    moved = [np.abs(ab['up']).max() for ab in adapter.values()]
    assert min(moved) == pytest.approx(0.01 * 8 / 4, rel=0.1)
    theirs.load_lora_weights(file)
    loaded = [name for name, x in theirs.unet.named_modules() if hasattr(x, 'lora_A')]
    assert len(loaded) == len(adapter)
