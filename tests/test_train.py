"""The distillation run: resumes exactly, exports what it trained, leaves the base alone."""

import jax
import numpy as np
import optax
import pytest

from lcm_jax import demo, lora, metrics, train
from lcm_jax.data.emoji import emoji
from lcm_jax.errors import InputError
from lcm_jax.lora_files.files import read_lora, write_lora
from lcm_jax.pipeline import Pipeline

RECIPE = {**demo.RECIPE, 'batch': 8, 'warmup': 1, 'log_every': 1, 'rank': 4, 'alpha': 8.0}


@pytest.fixture(scope='module')
def teacher():
    return Pipeline.load('emoji')


@pytest.fixture(scope='module')
def cache(teacher):
    return train.encode(teacher, emoji('heldout', ('noto',)))


def run(teacher, cache, workdir, steps, **changes):
    return train.distil(
        teacher,
        cache,
        steps=steps,
        workdir=workdir,
        **{**RECIPE, 'save_every': 2, 'decay': False, **changes},
    )


def test_resumed_run_is_bit_equal(teacher, cache, tmp_path):
    before = jax.tree.map(np.asarray, teacher.params['unet'])
    whole = run(teacher, cache, tmp_path / 'whole', 4)
    run(teacher, cache, tmp_path / 'parts', 2)
    parts = run(teacher, cache, tmp_path / 'parts', 4)
    for path, ab in whole.items():
        for name in ab:
            np.testing.assert_array_equal(ab[name], parts[path][name], err_msg=f'{path} {name}')
    assert any(np.abs(ab['up']).max() > 0 for ab in whole.values())
    jax.tree.map(
        np.testing.assert_array_equal, before, jax.tree.map(np.asarray, teacher.params['unet'])
    )

    file = tmp_path / 'lora.safetensors'
    write_lora(file, {'unet': whole}, teacher.params, alpha=RECIPE['alpha'])
    back, metadata = read_lora(file, teacher.params)
    assert back['unet'].keys() == whole.keys()
    assert metadata['ss_network_dim'] == '4' and metadata['ss_network_alpha'] == '8.0'


def test_gradient_steps_lower_the_loss_towards_a_fixed_target(teacher, cache):
    """The loss itself has a moving target and need not fall; with the target held, it must."""
    loss = train.make_loss(
        teacher,
        scale=1.0,
        target='ema',
        solver_steps=50,
        w_range=(2, 4),
        distance='huber',
        huber_c=0.001,
    )
    start = lora.init(jax.random.key(0), teacher.params['unet'], 4)
    frozen, samples = (teacher.params['unet'], cache), np.arange(16)
    value = jax.jit(
        jax.value_and_grad(lambda x: loss(x, start, frozen, samples, jax.random.key(7))[0])
    )
    tx = optax.adam(1e-3)
    params, opt, values = start, tx.init(start), []
    for _ in range(10):
        now, grads = value(params)
        values.append(float(now))
        updates, opt = tx.update(grads, opt)
        params = optax.apply_updates(params, updates)
    assert values[-1] < 0.9 * values[0], values


def test_settings_outside_the_tables_are_refused(teacher, cache, tmp_path):
    for changes, said in (
        ({'distance': 'hubert'}, "did you mean 'huber'"),
        ({'target': 'teacher'}, 'student, ema'),
        ({'weights': 'best'}, 'params, ema'),
        ({'batch': 5000}, 'must not exceed'),
        ({'decay': True, 'warmup': 1}, 'must be less'),
        ({'targets': 'to_quack'}, 'to_quack'),
    ):
        with pytest.raises(InputError, match=said):
            run(teacher, cache, tmp_path, 1, **changes)


def test_demo_writes_everything(monkeypatch, tmp_path, capsys):
    ways = demo.ways
    monkeypatch.setattr(demo, 'ways', lambda *pipes: ways(*pipes)[-2:])
    demo.demo(tmp_path, steps=2)
    assert (tmp_path / 'grid.png').stat().st_size > 20_000
    report = (tmp_path / 'report.md').read_text()
    assert 'shipped LCM-LoRA 4' in report and 'real pictures' in report
    assert list((tmp_path / 'train').glob('events*'))
    said = capsys.readouterr().out
    assert 'lcm-jax sample' in said and str(tmp_path / 'lcm_lora.safetensors') in said


def test_shipped_models_reach_their_figures():
    """The floor under the model card's figures, on fewer pictures: a broken weight file cannot pass."""
    samples = emoji('train', ('noto', 'twemoji'))[::26][:110]
    captions = [s.caption for s in samples]
    pipe = Pipeline.load('emoji')
    from lcm_jax.evaluate import Features
    from lcm_jax.grid import pixels

    features = Features(pipe)
    texts = features.texts(captions)
    real = metrics.retrieval(features.images(np.stack([s.picture for s in samples])), texts)
    pipe.add_lora('lcm')
    drawn = metrics.retrieval(features.images(pixels(pipe(captions, steps=4))), texts)
    assert real > 0.8
    assert drawn > 0.6 * real
