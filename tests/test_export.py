"""What a run exports, and that it opens here and in diffusers."""

import json
import re
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from random_model import write_model
from safetensors.numpy import load_file, save_file

from lcm_jax import export, train
from lcm_jax.errors import InputError
from lcm_jax.lora import delta
from lcm_jax.lora_files.files import read_lora
from lcm_jax.model import describe
from lcm_jax.models import shapes
from lcm_jax.pipeline import Pipeline
from lcm_jax.student import full_student

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # ml_collections' own
    pytest.mark.usefixtures('quick_compiler'),
]


@pytest.mark.parametrize(
    'name', ['', '.', '..', '.hidden', '../other', 'a/b', 'a\\b', *export.RESERVED, 'Cache']
)
def test_names_under_which_nothing_is_exported(model, tmp_path, name):
    with pytest.raises(InputError, match=re.escape(f'export.name = {name!r}; give a name in')):
        runs.run(model, tmp_path, export__name=name)


def test_a_folder_that_holds_no_model_is_not_replaced(model, tmp_path):
    (tmp_path / 'mine').mkdir()
    with pytest.raises(InputError, match='mine is there and holds no model'):
        export.export_folder(tmp_path / 'mine', {}, None, None, None)
    assert (tmp_path / 'mine').is_dir()


def test_ranks_and_alphas_by_pattern_come_back_from_the_file(model, tmp_path):
    rows = (
        ('.*to_[qkv]/kernel', 2, 6.0),
        ('.*conv1/kernel', 0, 1.0),
        ('.*/(ff.*|conv.*)/kernel', 3, 1.0),
    )
    settings = {'lora.targets': rows, 'train.steps': 3, 'train.lr': 0.01}
    file = train.run(runs.config(model, settings), tmp_path)
    base = Pipeline.load(model).params
    read, metadata = read_lora(file, base)
    state = runs.state(tmp_path)
    alphas = {2: 6.0, 3: 1.0}
    paths = {k.split('/', 1)[1].rsplit('/', 1)[0] for k in state if k.startswith('params/')}
    assert {*read['unet']} == paths and not any('conv1' in p for p in paths)
    assert {ab['down'].shape[-1] for ab in read['unet'].values()} == {2, 3}
    for path, ab in read['unet'].items():
        down, up = (state[f'params/{path}/{part}'] for part in ('down', 'up'))
        want = alphas[down.shape[-1]] / down.shape[-1] * (down @ up)
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(delta(ab), want, atol=2e-3 * np.abs(want).max())
    assert metadata['lcm_jax.accelerates'] == 'true' and metadata['lcm_jax.w'] == '2:4'


def test_the_best_is_exported_beside_the_last(model, tmp_path):
    runs.run(model, tmp_path, train__steps=8, train__lr=0.05, train__keep=9, export__weights='ema')
    scores = {x['step']: x['distance'] for x in runs.lines(tmp_path) if 'distance' in x}
    best = min(scores, key=scores.get)
    assert len(scores) == 4
    base = Pipeline.load(model).params
    for name, at in (('lora_best', best), ('lora', 8)):
        state = runs.state(tmp_path, at)
        for path, ab in read_lora(tmp_path / f'{name}.safetensors', base)[0]['unet'].items():
            want = 2.0 * state[f'ema/{path}/down'] @ state[f'ema/{path}/up']
            np.testing.assert_allclose(delta(ab), want, atol=2e-3 * np.abs(want).max() + 1e-7)


def test_a_full_lcm_opens_here_and_in_diffusers(model, tmp_path):
    out = runs.run(model, tmp_path, trains='full', full__w_dim=8, train__steps=2, train__lr=0.01)
    params = {k: x for k, x in runs.state(tmp_path).items() if k.startswith('params/')}
    pipe = Pipeline.load(out)
    assert pipe.specs['unet'].w_dim == 8
    got = dict(runs.named(pipe.params['unet']))
    assert {f'params/{k}' for k in got} == {*params}
    for k, x in got.items():
        np.testing.assert_array_equal(x, params[f'params/{k}'], err_msg=k)
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert isinstance(theirs, diffusers.LatentConsistencyModelPipeline)
    assert theirs.unet.config.time_cond_proj_dim == 8
    assert json.loads((out / 'model_index.json').read_text())['_lcm_jax']['w'] == '2:4'
    assert pipe.manner(None, None, None, False) == ('lcm', 4.0, False)  # guidance 1 + w
    with pytest.warns(UserWarning, match='guidance 8.5, but this model has learnt 3 to 5'):
        pipe.manner(None, 8.5, None, False)
    assert isinstance(theirs.scheduler, diffusers.LCMScheduler)
    prompt, noise = 'a red disc on green', np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    import torch

    latents = torch.tensor(noise, dtype=torch.float32)
    picture = theirs(
        prompt, height=16, width=16, num_inference_steps=1, guidance_scale=4.0,
        original_inference_steps=50, latents=latents, output_type='np',
    ).images  # fmt: skip
    assert picture.shape == (1, 16, 16, 3) and np.isfinite(picture).all()


@pytest.mark.parametrize('objective', ['lcm', 'lcf'])
def test_what_is_trained_starts_as_precise_as_the_file(model, tmp_path, objective):
    """Though the frozen networks are in bfloat16."""
    changes = {'objective': objective, 'dtype': 'bfloat16', 'train__steps': 0}
    out = runs.run(model, tmp_path, trains='full', **changes)
    file = Path('unet', 'diffusion_pytorch_model.safetensors')
    got, want = load_file(out / file), load_file(model / file)
    for key, x in want.items():
        np.testing.assert_array_equal(got[key], x, err_msg=key)
    assert any(np.any(x != x.astype(jnp.bfloat16)) for x in want.values())


def test_a_model_that_does_not_read_back_is_not_left(model, tmp_path, monkeypatch):
    def damaged(ckpt, found, folder):
        write(ckpt, found, folder)
        file = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
        tensors = load_file(file)
        tensors['conv_in.bias'] = tensors['conv_in.bias'] + 1
        save_file(tensors, file)

    write = export.write_diffusers
    monkeypatch.setattr(export, 'write_diffusers', damaged)
    with pytest.raises(InputError, match=r'unet conv_in\.bias does not read back'):
        runs.run(model, tmp_path, trains='full', train__steps=0)
    assert not (tmp_path / 'lora').exists()


def test_a_full_lcm_with_two_text_encoders_opens_here_and_in_diffusers(tmp_path):
    """diffusers' LCM pipeline takes one; SDXL's own class has a guidance input too."""
    write_model(tmp_path / 'xl', tiny.MODELS['sdxl'], np.float32, keep=False)
    settings = {'trains': 'full', 'full.w_dim': 8}
    config = runs.config(tmp_path / 'xl', settings)
    base = describe(tmp_path / 'xl')
    student = full_student(base.specs['unet'], shapes.unet_shapes(base.specs['unet']), config)
    trained = student.init(None, base.load(['unet'], {'unet': jnp.float32})['unet'])
    out = export.export(tmp_path / 'out', trained, base, student, config)
    found = describe(out)
    told = {'embedded': 4, 'told': (3, 5)}  # what it learnt
    assert found.specs['unet'].w_dim == 8 and found.family == base.family._replace(**told)
    found.checkpoint.tensors('unet')
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert isinstance(theirs, diffusers.StableDiffusionXLPipeline)
    assert theirs.unet.config.time_cond_proj_dim == 8


@pytest.mark.parametrize(
    ('objective', 'kind'),
    [('lcf', 'StableDiffusionPipeline'), ('lcm', 'LatentConsistencyModelPipeline')],
)
def test_a_part_of_the_unet_is_trained(model, tmp_path, objective, kind):
    """And the new guidance input of an LCM, which the base lacks."""
    settings = {'objective': objective, 'trains': 'full', 'full__trainable': '.*/attn2/.*'}
    out = runs.run(model, tmp_path, train__steps=2, train__lr=0.01, full__w_dim=8, **settings)
    before, after = (dict(runs.named(Pipeline.load(m).params['unet'])) for m in (model, out))
    new = after.keys() - before.keys()
    assert len(new) == (objective == 'lcm') and all('cond_proj' in k for k in new)
    changed = {k for k in before if np.any(np.asarray(before[k]) != np.asarray(after[k]))}
    assert changed and all('/attn2/' in k for k in changed)
    said = json.loads((out / 'model_index.json').read_text())
    assert said['_class_name'] == kind
    assert said['scheduler'] == ['diffusers', 'LCMScheduler']
    assert said['_lcm_jax']['objective'] == objective


@pytest.mark.parametrize(
    ('objective', 'w_dim', 'said'),
    [
        ('lcm', 8, {'accelerates': 'true', 'w': '2:4', 'solver': 'ddim', 'solver_steps': '50'}),
        ('lcf', 0, {'accelerates': 'true', 'solver_steps': '50'}),
        ('lcf', 8, {'accelerates': 'true', 'w': '2:4', 'solver_steps': '50'}),
        ('denoise', 0, {}),
    ],
)
def test_only_what_the_objective_used_is_recorded(model, objective, w_dim, said):
    config = runs.config(model, {'objective': objective})
    assert export.recipe(config, w_dim) == {'objective': objective} | said
    config.distill.w = 'script'
    assert export.recipe(config, w_dim).get('w') == ('5:15' if 'w' in said else None)
