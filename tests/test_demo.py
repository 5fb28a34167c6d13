"""The demo, and the models that are shipped."""

import numpy as np
import pytest

from lcm_jax import demo, metrics
from lcm_jax.data.emoji import emoji
from lcm_jax.features import open_features
from lcm_jax.grid import pixels
from lcm_jax.pipeline import Pipeline

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # ml_collections' own
    pytest.mark.usefixtures('quick_compiler'),
]


def test_demo_writes_everything(monkeypatch, tmp_path, capsys):
    training, evaluation = demo.training, demo.evaluation

    def short_training(steps):
        config = training(steps)
        config.data.source = 'emoji-heldout:noto'
        config.lora.targets = (('.*attn2/to_q/kernel', 2, 2.0),)
        config.train.batch = 2
        prompts = ('red heart, noto emoji',)
        config.preview.update(prompts=prompts, sampler='ddim', steps=2, teacher_steps=2)
        return config

    def short_evaluation(*args):
        config = evaluation(*args)
        config.ways = ({'label': 'teacher', 'sampler': 'ddim', 'steps': 2}, config.ways[-1])
        config.real = 'emoji-heldout:noto'
        return config

    monkeypatch.setattr(demo, 'COUNT', 8)
    monkeypatch.setattr(demo, 'training', short_training)
    monkeypatch.setattr(demo, 'evaluation', short_evaluation)
    demo.demo(tmp_path, steps=2)
    assert (tmp_path / 'grid.png').stat().st_size > 20_000
    report = (tmp_path / 'report.md').read_text()
    assert 'shipped LCM-LoRA' in report and 'real pictures' in report
    assert list((tmp_path / 'train').glob('events*'))
    said = capsys.readouterr().out
    assert 'lcm-jax sample' in said and str(tmp_path / 'lcm_lora.safetensors') in said


def test_shipped_models_reach_their_figures():
    """The floor under the model card's figures, on fewer pictures: a broken weight file cannot pass."""
    samples = emoji('train', ('noto', 'twemoji'))[::26][:110]
    captions, numbers = [s.caption for s in samples], np.arange(110)
    features = open_features('emoji')
    texts = features.texts(captions)

    def found(pictures):
        return metrics.retrieved(features.images(pictures), texts, numbers).mean()

    real = found(np.stack([s.picture for s in samples]))
    pipe = Pipeline.load('emoji')
    pipe.add_lora('lcm')
    assert real > 0.8
    assert found(pixels(pipe(captions, steps=4))) > 0.6 * real
