"""LoRA as functions on parameters, and its files, against diffusers with peft."""

import dataclasses
import functools
import json
import logging
import re
from functools import partial

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin

from lcm_jax import lora, weights
from lcm_jax.errors import InputError
from lcm_jax.lora_io import read_lora, write_lora
from lcm_jax.models import configs
from lcm_jax.models.shapes import unet_shapes
from lcm_jax.models.unet import UNet, UNetSpec
from lcm_jax.models.zoo import MODELS
from lcm_jax.tree import cast, count, named

torch.set_num_threads(1)

# It has every kind of adapted layer: Dense with and without bias, 1x1, 3x3 and 3x3 strided conv.
SPEC = UNetSpec(
    widths=(8, 16),
    down=((1,), (0,)),
    mid=1,
    up=((0, 0), (1, 1)),
    heads=(2, 2),
    context_dim=12,
    groups=4,
)
TINY = dataclasses.replace(SPEC, down=((0,), (0,)), up=((0, 0), (0, 0)))  # quicker to compile
DIALECTS = ('kohya', 'peft')


@functools.cache
def base(spec=SPEC):
    """Random parameters of the small UNet, as numpy arrays; none of them is zero."""
    return randomised(unet_shapes(spec), 1.0)


def randomised(tree, size, seed=0):
    """Kernels of norm about `size` per output channel; biases and norms' scales around a half."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        value = rng.normal(size=x.shape)
        value = size * value / np.prod(x.shape[:-1]) ** 0.5 if x.ndim > 1 else 0.5 + 0.2 * value
        return value.astype(np.float32)

    return jax.tree.map(leaf, tree)


@functools.cache
def adapter(spec=SPEC, seed=1):
    """An adapter of rank 4 for the small UNet as after training: no factor is zero."""
    return randomised(abstract_adapter(unet_shapes(spec), 4), 0.5, seed)


def abstract_adapter(shapes, rank):
    return jax.eval_shape(lambda key: lora.init(key, shapes, rank), jax.random.key(0))


def inputs():
    rng = np.random.default_rng(2)
    z, context = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 4, 4), (2, 3, 12)))
    return z, np.array([19.0, 999.0], np.float32), context


def net(params, *args):
    return UNet(TINY).apply({'params': params}, *args)


def relative(got, want):
    """Norm of the difference over the norm, of whole trees."""
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# The functions


def test_init_covers_the_targets_and_is_neutral():
    ab = lora.init(jax.random.key(0), base(), 3)
    assert not [path for path in ab if re.search(r'conv_in|conv_out|time_embedding', path)]
    assert ab['down_blocks.0.resnets.0/conv1/kernel']['down'].shape == (3, 3, 8, 3)
    assert ab['down_blocks.0.resnets.0/conv1/kernel']['up'].shape == (1, 1, 3, 8)
    to_k = ab['mid_block.attentions.0/transformer_blocks.0/attn2/to_k/kernel']
    assert to_k['down'].shape == (12, 3) and to_k['up'].shape == (3, 16)
    for path, factors in ab.items():
        assert not factors['up'].any()
        bound = np.prod(factors['down'].shape[:-1]) ** -0.5  # kaiming_uniform(a=sqrt(5)), as PEFT
        assert 0.8 * bound < np.abs(factors['down']).max() <= bound, path
        assert np.abs(factors['down'].mean()) < 0.5 * bound, path
    jax.tree.map(np.testing.assert_array_equal, lora.merge(base(), ab), base())


def test_init_without_a_match_is_refused():
    with pytest.raises(InputError, match=r"no parameter matches the LoRA targets 'to_qq'"):
        lora.init(jax.random.key(0), base(), 3, 'to_qq')


@pytest.mark.parametrize(
    ('model', 'modules', 'parameters'),
    [('sd15', 278, 67_252_224), ('ssd1b', 423, 104_902_656), ('sdxl', 788, 196_751_360)],
)
def test_target_modules_at_full_size(model, modules, parameters):
    shapes = unet_shapes(MODELS[model].unet)
    ab = abstract_adapter(shapes, 64)
    assert (len(ab), count(ab)) == (modules, parameters)


@functools.cache
def forwards():
    """way -> jitted (adapter, traced scale) -> (output, gradient of a loss by the adapter)."""
    args, params = inputs(), base(TINY)
    remat = partial(nn.remat(UNet)(TINY).apply, {'params': params})
    ways = {
        'merge': lambda ab, scale: net(lora.merge(params, ab, scale), *args),
        'apply': lambda ab, scale: lora.apply(partial(net, params), ab, scale)(*args),
        'apply, rematerialised': lambda ab, scale: lora.apply(remat, ab, scale)(*args),
    }

    def both(way):
        def loss(ab, scale):
            out = way(ab, scale)
            return jnp.mean(jnp.sin(3 * out)), out

        def run(ab, scale):
            gradient, out = jax.grad(loss, has_aux=True)(ab, scale)
            return out, gradient

        return jax.jit(run)

    return {name: both(way) for name, way in ways.items()}


@pytest.mark.parametrize('way', ['apply', 'apply, rematerialised'])
def test_apply_is_merge(way):
    out, gradient = forwards()[way](adapter(TINY), 0.7)
    want, want_gradient = forwards()['merge'](adapter(TINY), 0.7)
    without, _ = forwards()['merge'](adapter(TINY), 0.0)
    assert relative(want, without) > 0.05
    worst = max(relative(gradient[path], want_gradient[path]) for path in want_gradient)
    print(f'{way}: output differs by {relative(out, want):.1e}, gradients by at most {worst:.1e}')
    assert relative(out, want) < 1e-5
    assert worst < 1e-4


@pytest.mark.parametrize(
    'layer',
    [
        partial(nn.Dense, 6),
        partial(nn.Dense, 6, use_bias=False),
        partial(nn.Conv, 6, (1, 1)),
        partial(nn.Conv, 6, (3, 3), strides=2),
        partial(nn.Conv, 6, (3, 3), strides=(1, 2), padding=1),
        partial(nn.Conv, 6, (3, 3), padding=((1, 1), (0, 2))),
        partial(nn.Conv, 6, (3, 3), kernel_dilation=2, padding='VALID'),
    ],
)
def test_apply_is_merge_for_every_form_of_a_layer(layer):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(name='conv1')(x)

    x = inputs()[0].repeat(2, 1).repeat(2, 2)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)['params']
    params, ab = randomised(shapes, 0.3), randomised(abstract_adapter(shapes, 2), 0.5)
    applied = lora.apply(lambda x: Net().apply({'params': params}, x), ab, 0.7)(x)
    want = Net().apply({'params': lora.merge(params, ab, 0.7)}, x)
    assert relative(applied, want) < 1e-5


def test_half_precision_base_stays_half():
    half, args = cast(base(TINY), jnp.bfloat16), [x.astype(jnp.bfloat16) for x in inputs()]
    scale = jnp.float32(0.7)
    out = jax.eval_shape(lambda ab: lora.apply(partial(net, half), ab, scale)(*args), adapter(TINY))
    assert out.dtype == jnp.bfloat16
    merged = jax.eval_shape(lambda ab: lora.merge(half, ab, scale), adapter(TINY))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype('bfloat16')}


def test_merge_adds_scaled_updates_and_undoes_them():
    back = lora.merge(lora.merge(base(), adapter(), 0.8), adapter(), -0.8)
    assert relative(back, base()) < 1e-6
    both = lora.merge(lora.merge(base(), adapter(), 0.8), adapter(seed=5), 1.0)
    path = 'mid_block.resnets.0/conv1/kernel'
    want = 0.8 * lora.delta(adapter()[path]) + lora.delta(adapter(seed=5)[path])
    got = dict(named(both))[path] - dict(named(base()))[path]
    assert relative(got, want) < 1e-5


def test_merge_refuses_what_the_model_lacks():
    with pytest.raises(
        InputError, match=r'1 of 1 adapted modules are not in the model: nowhere/kernel'
    ):
        lora.merge(base(), {'nowhere/kernel': adapter()['mid_block.resnets.0/conv1/kernel']})


# The files


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [('float32', 1e-6), ('float16', 1e-3), ('bfloat16', 8e-3)]
)
@pytest.mark.parametrize('alpha', [4, 1, 16, 0.3])
def test_write_and_read_back(tmp_path, dialect, dtype, tolerance, alpha):
    file = tmp_path / 'lora.safetensors'
    write_lora(file, adapter(), alpha=alpha, dialect=dialect, dtype=dtype, metadata={'mine': 'yes'})
    back, metadata = read_lora(file, unet_shapes(SPEC))
    assert (
        back.keys() == adapter().keys() and metadata['mine'] == 'yes' and metadata['format'] == 'pt'
    )
    for path, ab in adapter().items():
        assert back[path]['down'].dtype == back[path]['up'].dtype == np.float32
        assert relative(lora.delta(back[path]), lora.delta(ab)) < tolerance, path
    tensors, _ = weights.read_tensors(file)
    assert {str(x.dtype) for x in tensors.values()} == {dtype}
    assert len(tensors) == len(adapter()) * (3 if dialect == 'kohya' else 2)


def test_files_are_written_in_the_published_form(tmp_path):
    write_lora(tmp_path / 'k', adapter(), alpha=8)
    tensors, metadata = weights.read_tensors(tmp_path / 'k')
    name = 'lora_unet_down_blocks_0_downsamplers_0_conv'
    assert tensors[f'{name}.lora_down.weight'].shape == (4, 8, 3, 3)
    assert tensors[f'{name}.lora_up.weight'].shape == (8, 4, 1, 1)
    assert tensors[f'{name}.alpha'].shape == () and tensors[f'{name}.alpha'] == 8
    assert metadata['ss_network_dim'] == '4' and float(metadata['ss_network_alpha']) == 8
    name = 'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k'
    assert tensors[f'{name}.lora_down.weight'].shape == (4, 12)
    write_lora(tmp_path / 'p', adapter(), alpha=8, dialect='peft')
    tensors, metadata = weights.read_tensors(tmp_path / 'p')
    assert (
        'unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight' in tensors
    )
    config = json.loads(metadata['lora_adapter_metadata'])
    assert (config['unet.r'], config['unet.lora_alpha']) == (4, 8)


@pytest.mark.parametrize('size', [1e-3, 1e-6, 1e-12, 0])
def test_small_updates_can_be_written(tmp_path, size):
    """As after the first steps of a run with warm-up: float16 has few digits there."""
    small = {path: {'down': ab['down'], 'up': size * ab['up']} for path, ab in adapter().items()}
    write_lora(tmp_path / 'f', small, alpha=64)
    back, _ = read_lora(tmp_path / 'f', base())
    for path, ab in small.items():
        np.testing.assert_allclose(back[path]['up'], ab['up'], rtol=2e-3, atol=1e-6)


def test_missing_alpha_means_scale_one(tmp_path):
    write_lora(tmp_path / 'f', adapter(), alpha=4, dtype=np.float32)
    tensors, _ = weights.read_tensors(tmp_path / 'f')
    weights.write_tensors(
        tmp_path / 'g', {k: x for k, x in tensors.items() if not k.endswith('alpha')}
    )
    assert relative(read_lora(tmp_path / 'g', base())[0], adapter()) < 1e-6


def peer(spec, params):
    """diffusers' UNet with our parameters."""
    unet = diffusers.UNet2DConditionModel.from_config(configs.unet_config(spec, 8))
    tensors = {k: torch.tensor(x) for k, x in weights.dump(params).items()}
    unet.load_state_dict(tensors, strict=True)
    return unet


def mixed_ranks():
    return {
        path: {'down': ab['down'][..., :2], 'up': ab['up'][..., :2, :]} if 'attn1' in path else ab
        for path, ab in adapter().items()
    }


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize(('make', 'alpha'), [(adapter, 4), (adapter, 1.5), (mixed_ranks, 4)])
def test_diffusers_and_peft_read_the_file_whole(tmp_path, caplog, dialect, make, alpha):
    """No module missing, unexpected or ignored, and fused weights are our merged ones."""
    ab = make()
    write_lora(tmp_path / 'lora.safetensors', ab, alpha=alpha, dialect=dialect)
    unet = peer(SPEC, base())
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.INFO):
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            tmp_path / 'lora.safetensors', unet_config=unet.config, return_lora_metadata=True
        )
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    diffusers.utils.logging.disable_propagation()
    assert not re.search(r'missing|unexpected|ignore|not found', caplog.text, re.IGNORECASE), (
        caplog.text
    )
    read = {
        name.removesuffix('.lora_A') for name, _ in unet.named_modules() if name.endswith('.lora_A')
    }
    assert read == {path.removesuffix('/kernel').replace('/', '.') for path in ab}
    unet.fuse_lora()
    fused = {
        k.replace('.base_layer', ''): x.numpy()
        for k, x in unet.state_dict().items()
        if 'lora_' not in k
    }
    before = weights.dump(base())
    for key, want in weights.dump(lora.merge(base(), ab)).items():
        assert relative(fused[key], want) < 1e-3, key
        if not np.array_equal(want, before[key]):
            assert relative(fused[key] - before[key], want - before[key]) < 1e-3, key
    print(f'{dialect}: {len(read)} of {len(ab)} modules read')


# Bad files: one line that names the file, and nothing written


def edited(tmp_path, edit, dialect='kohya'):
    """A good file after `edit(tensors, metadata)`."""
    write_lora(tmp_path / 'good.safetensors', adapter(), alpha=4, dialect=dialect)
    tensors, metadata = weights.read_tensors(tmp_path / 'good.safetensors')
    edit(tensors, metadata)
    weights.write_tensors(tmp_path / 'bad.safetensors', tensors, metadata)
    return tmp_path / 'bad.safetensors'


def refused(file, message, params=None):
    with pytest.raises(InputError) as e:
        read_lora(file, params or base())
    said = str(e.value)
    assert '\n' not in said and file.name in said and re.search(message, said), said


CONV = 'lora_unet_mid_block_resnets_0_conv1'
TO_Q = 'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q'


def rename(old, new):
    def edit(tensors, metadata):
        tensors[new] = tensors.pop(old)

    return edit


def change(key, fn):
    def edit(tensors, metadata):
        tensors[key] = np.asarray(fn(tensors[key]))

    return edit


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda tensors, _: tensors.clear(), 'holds no tensors'),
        (
            lambda tensors, _: tensors.pop(f'{CONV}.lora_up.weight'),
            rf'mid_block\.resnets\.0\.conv1 lacks {CONV}\.lora_up\.weight$',
        ),
        (
            lambda tensors, _: tensors.pop(f'{CONV}.lora_down.weight'),
            r'lacks .*lora_down\.weight$',
        ),
        (
            rename(f'{TO_Q}.lora_up.weight', TO_Q.replace('to_q', 'to_qq') + '.lora_up.weight'),
            rf"1 of \d+ tensors belong to no .*kohya, peft.*did you mean '{TO_Q}\.lora_up\.weight'",
        ),
        (
            rename(
                f'{TO_Q}.lora_up.weight',
                'lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight',
            ),
            'nothing was loaded',
        ),
        (
            change(f'{CONV}.lora_down.weight', lambda x: x[:, :5]),
            r'factors \(4, 5, 3, 3\) and \(16, 4, 1, 1\)',
        ),
        (change(f'{CONV}.lora_down.weight', lambda x: x[:2]), 'do not fit the weight'),
        (change(f'{CONV}.lora_down.weight', lambda x: x[:0]), 'do not fit the weight'),
        (change(f'{CONV}.lora_down.weight', lambda x: x.ravel()), 'do not fit the weight'),
        (change(f'{CONV}.lora_down.weight', lambda x: x[0, 0, 0, 0]), 'do not fit the weight'),
        (change(f'{CONV}.lora_up.weight', lambda x: x[:, :, 0, 0]), 'do not fit the weight'),
        (change(f'{TO_Q}.lora_up.weight', lambda x: x[None]), 'do not fit the weight'),
        (change(f'{TO_Q}.alpha', lambda x: np.ones(3, np.float16)), r'alpha of shape \(3,\)'),
        (
            change(f'{TO_Q}.alpha', lambda x: np.nan),
            r'attn1\.to_q holds values that are not finite',
        ),
        (
            change(f'{TO_Q}.lora_up.weight', lambda x: x * np.nan),
            r'attn1\.to_q holds values that are not finite',
        ),
        (change(f'{TO_Q}.lora_down.weight', lambda x: x * np.inf), 'values that are not finite'),
        *(
            (
                rename(f'{TO_Q}.lora_up.weight', f'{TO_Q}.{leaf}'),
                f'is a {method} file .*not supported',
            )
            for leaf, method in (
                ('dora_scale', 'DoRA'),
                ('lora_magnitude_vector', 'DoRA'),
                ('lora_mid.weight', 'LyCORIS LoCon'),
                ('hada_w1_a', 'LyCORIS LoHa'),
                ('lokr_w1', 'LyCORIS LoKr'),
            )
        ),
    ],
)
def test_bad_files(tmp_path, edit, message):
    refused(edited(tmp_path, edit), message)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ('not JSON', 'lora_adapter_metadata is not a peft config in JSON'),
        ('[1]', 'is not a peft config'),
        ('{"unet.lora_alpha": "four"}', 'is not a peft config'),
        ('{"unet.use_rslora": true}', 'use_rslora in its lora_adapter_metadata is not supported'),
        (
            '{"unet.alpha_pattern": {"to_q": 3}}',
            'alpha_pattern in its lora_adapter_metadata is not supported',
        ),
        ('{"unet.lora_alpha": NaN}', 'not finite'),
    ],
)
def test_bad_peft_metadata(tmp_path, value, message):
    file = edited(
        tmp_path, lambda _, metadata: metadata.update(lora_adapter_metadata=value), 'peft'
    )
    refused(file, message)


@pytest.mark.parametrize('keep', [0, 7, 100, 0.5, -1])
def test_truncated_files(tmp_path, keep):
    file = edited(tmp_path, lambda *_: None)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))] if isinstance(keep, float) else whole[:keep])
    refused(file, 'is not a readable safetensors file')


def test_a_missing_file(tmp_path):
    refused(tmp_path / 'nowhere.safetensors', 'no such file')


@pytest.mark.parametrize('model', ['sd15', 'sdxl'])
def test_a_lora_for_another_base(tmp_path, model):
    refused(
        edited(tmp_path, lambda *_: None),
        'do not fit the weight .*another base|belong to no module',
        unet_shapes(MODELS[model].unet),
    )


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'alpha': 0}, 'LoRA alpha = 0; float16 files take a positive number'),
        ({'alpha': -4}, 'LoRA alpha = -4'),
        ({'alpha': 1e6}, 'LoRA alpha = 1000000'),
        (
            {'alpha': 4, 'dialect': 'kohia'},
            r"unknown LoRA dialect 'kohia' \(did you mean 'kohya'\?\)",
        ),
        (
            {'alpha': 1e-5},
            r'lora\.safetensors in float16: module .* holds values that are not finite',
        ),
    ],
)
def test_what_cannot_be_written_is_not(tmp_path, kwargs, message):
    with pytest.raises(InputError, match=message):
        write_lora(tmp_path / 'lora.safetensors', adapter(), **kwargs)
    assert not list(tmp_path.iterdir())


def test_a_diverged_adapter_is_not_written(tmp_path):
    broken = jax.tree.map(lambda x: x * jnp.nan, adapter())
    with pytest.raises(InputError, match='holds values that are not finite'):
        write_lora(tmp_path / 'lora.safetensors', broken, alpha=4)
    assert not list(tmp_path.iterdir())
