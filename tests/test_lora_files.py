"""LoRA files: written, read back and refused; against diffusers with peft, and LyCORIS' formulas."""

import functools
import json
import logging
import re

import diffusers
import jax
import lora_dialects
import numpy as np
import pytest
import torch
from test_lora import SPEC, adapter, randomised, relative

from lcm_jax import lora, weights
from lcm_jax.lora_files import describe, files
from lcm_jax.lora_files.dialects import WRITTEN
from lcm_jax.lora_files.files import read_lora, write_lora
from lcm_jax.models import configs
from lcm_jax.models.shapes import text_shapes, unet_shapes
from lcm_jax.tensors import read_tensors, write_tensors
from lcm_jax.tree import named

torch.set_num_threads(1)
MODEL = {'unet': unet_shapes(SPEC)}


def write(file, ab=None, **options):
    write_lora(file, {'unet': ab or adapter()}, MODEL, **{'alpha': 4} | options)


def read(file):
    return read_lora(file, MODEL)[0]['unet']


@pytest.mark.parametrize('dialect', WRITTEN)
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [('float32', 1e-6), ('float16', 1e-3), ('bfloat16', 8e-3)]
)
@pytest.mark.parametrize('alpha', [4, 1, 16, 0.3])
def test_write_and_read_back(tmp_path, dialect, dtype, tolerance, alpha):
    file = tmp_path / 'lora.safetensors'
    write(file, alpha=alpha, dialect=dialect, dtype=dtype, metadata={'mine': 'yes'})
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    back, metadata = read_lora(file, MODEL)
    assert metadata['mine'] == 'yes' and metadata['format'] == 'pt'
    assert back['unet'].keys() == adapter().keys()
    for path, ab in adapter().items():
        ours = back['unet'][path]
        assert ours['down'].dtype == ours['up'].dtype == np.float32
        assert relative(lora.delta(ours), lora.delta(ab)) < tolerance, path
    tensors, _ = read_tensors(file)
    assert {str(x.dtype) for x in tensors.values()} == {dtype}
    assert len(tensors) == len(adapter()) * len(WRITTEN[dialect])


def test_files_are_written_in_the_published_form(tmp_path):
    write(tmp_path / 'k', alpha=8)
    tensors, metadata = read_tensors(tmp_path / 'k')
    name = 'lora_unet_down_blocks_0_downsamplers_0_conv'
    assert tensors[f'{name}.lora_down.weight'].shape == (4, 8, 3, 3)
    assert tensors[f'{name}.lora_up.weight'].shape == (8, 4, 1, 1)
    assert tensors[f'{name}.alpha'].shape == () and tensors[f'{name}.alpha'] == 8
    assert metadata['ss_network_dim'] == '4' and float(metadata['ss_network_alpha']) == 8
    name = 'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k'
    assert tensors[f'{name}.lora_down.weight'].shape == (4, 12)
    write(tmp_path / 's', dialect='kohya-sgm')
    tensors, _ = read_tensors(tmp_path / 's')
    assert tensors['lora_unet_input_blocks_2_0_op.lora_down.weight'].shape == (4, 8, 3, 3)
    write(tmp_path / 'p', alpha=8, dialect='peft')
    tensors, metadata = read_tensors(tmp_path / 'p')
    to_out = 'unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight'
    assert to_out in tensors
    config = json.loads(metadata['lora_adapter_metadata'])
    assert (config['unet.r'], config['unet.lora_alpha']) == (4, 8)


@pytest.mark.parametrize(
    ('model', 'text', 'unet'),
    [
        ('sd15', 'lora_te_text_model', 'lora_unet_down_blocks_'),
        ('sd21', 'lora_te_text_model', 'lora_unet_down_blocks_'),
        ('sdxl', 'lora_te1_text_model', 'lora_unet_input_blocks_'),
        ('ssd1b', 'lora_te1_text_model', 'lora_unet_input_blocks_'),
    ],
)
def test_the_default_dialect_is_the_models(tmp_path, model, text, unet):
    models = lora_dialects.full_size(model)
    spots = [(c, p) for c, p, *_ in lora_dialects.adapted(models)][::29]
    pairs = {c: {} for c in models}
    for component, params in models.items():
        for path, w in named(params):
            if (component, path) in spots:
                up = np.ones((*(1,) * (w.ndim - 1), w.shape[-1]))
                pairs[component][path] = {'down': np.ones((*w.shape[:-1], 1)), 'up': up}
    write_lora(tmp_path / 'f', pairs, models, alpha=1)
    keys = [*read_tensors(tmp_path / 'f')[0]]
    prefixes = [text, unet, *(['lora_te2_text_model'] if 'text_encoder_2' in models else [])]
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)


@pytest.mark.parametrize('size', [1e-3, 1e-6, 1e-12, 0])
def test_small_updates_can_be_written(tmp_path, size):
    """As after the first steps of a run with warm-up: float16 has few digits there."""
    small = {path: {'down': ab['down'], 'up': size * ab['up']} for path, ab in adapter().items()}
    write(tmp_path / 'f', small, alpha=64)
    for path, ab in read(tmp_path / 'f').items():
        np.testing.assert_allclose(ab['up'], small[path]['up'], rtol=2e-3, atol=1e-6)


def test_missing_alpha_means_scale_one(tmp_path):
    write(tmp_path / 'f', dtype=np.float32)
    tensors, _ = read_tensors(tmp_path / 'f')
    tensors = {k: x for k, x in tensors.items() if not k.endswith('alpha')}
    write_tensors(tmp_path / 'g', tensors)
    assert relative(read(tmp_path / 'g'), adapter()) < 1e-6


def test_every_layer_has_its_own_rank_and_alpha(tmp_path):
    write(tmp_path / 'f', mixed_ranks(), alpha=4, dtype=np.float32)
    tensors, _ = read_tensors(tmp_path / 'f')
    tensors[f'{CONV}.alpha'] = np.array(12, np.float32)  # three times the others'
    tensors[f'{TO_Q}.alpha'] = np.array([2], np.float32)  # half, and of one axis
    write_tensors(tmp_path / 'g', tensors)
    back = read(tmp_path / 'g')
    for path, ab in mixed_ranks().items():
        factor = {'mid_block.resnets.0/conv1': 3, to_path(TO_Q): 0.5}.get(
            path[: -len('/kernel')], 1
        )
        assert relative(lora.delta(back[path]), factor * lora.delta(ab)) < 1e-6


def test_a_matrix_for_a_1x1_convolution_and_the_reverse(tmp_path):
    """SD 1's proj_in is a convolution, SD 2's a matrix; files of both kinds are found for both."""
    write(tmp_path / 'f', dtype=np.float32)
    tensors, _ = read_tensors(tmp_path / 'f')
    other = {}
    for key, x in tensors.items():
        proj, matrix = 'proj_in' in key and x.ndim, '_attn1_' in key and x.ndim
        other[key] = x[:, :, 0, 0] if proj else x[:, :, None, None] if matrix else x
    assert sum(x.ndim != tensors[key].ndim for key, x in other.items()) > 20
    write_tensors(tmp_path / 'g', other)
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / 'g'), read(tmp_path / 'f'))


def mixed_ranks():
    return {
        path: {'down': ab['down'][..., :2], 'up': ab['up'][..., :2, :]} if 'attn1' in path else ab
        for path, ab in adapter().items()
    }


def to_path(key):
    return re.sub(
        r'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q',
        'mid_block.attentions.0/transformer_blocks.0/attn1/to_q',
        key,
    )


# Against diffusers with peft

TEXT = {'vocab_size': 50, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2}
TEXT |= {'num_attention_heads': 2, 'projection_dim': 16, 'max_position_embeddings': 8}
TEXT |= {'bos_token_id': 0, 'eos_token_id': 2, 'pad_token_id': 1}
SMALL = {
    'sample_size': 8,
    'block_out_channels': (8, 16),
    'layers_per_block': 2,
    'norm_num_groups': 4,
}
SIZED = {
    'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
    'cross_attention_dim': 32,
    'attention_head_dim': (2, 4),
    'use_linear_projection': True,
    'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 8,
    'projection_class_embeddings_input_dim': 6 * 8 + 16,
}
UNETS = {
    'sd': {
        'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
        'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'),
        'cross_attention_dim': 16,
        'attention_head_dim': 2,
    },
    'sdxl': SIZED | {'transformer_layers_per_block': (1, 2)},
    'ssd1b': SIZED | {'mid_block_type': 'UNetMidBlock2D', 'transformer_layers_per_block': (1, 1)},
}


@functools.cache
def small_pipeline(kind):
    """diffusers' pipeline of a kind, without adapter -> (pipeline, {component: our parameters})."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**SMALL, **UNETS[kind])
    parts = {'unet': unet, 'text_encoder': CLIPTextModel(CLIPTextConfig(**TEXT))}
    none = dict.fromkeys(('vae', 'tokenizer', 'scheduler'))
    if kind == 'sd':
        none |= {'safety_checker': None, 'feature_extractor': None}
        pipe = diffusers.StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
    else:
        parts['text_encoder_2'] = CLIPTextModelWithProjection(
            CLIPTextConfig(**TEXT, architectures=['CLIPTextModelWithProjection'])
        )
        pipe = diffusers.StableDiffusionXLPipeline(**parts, **none, tokenizer_2=None)
    models = {}
    for part, net in parts.items():
        if part == 'unet':
            shapes = unet_shapes(configs.unet_spec(dict(net.config)))
        else:
            shapes = text_shapes(configs.text_spec(net.config.to_dict()))
        models[part] = weights.load(shapes, {k: x.numpy() for k, x in net.state_dict().items()})
    return pipe, models


@pytest.fixture
def diffusers_loads(caplog):
    """loads(kind, file) -> ({component: modules with weights}, {component: fused weights})."""
    loaded = []

    def loads(kind, file):
        pipe, models = small_pipeline(kind)
        loaded.append(pipe)
        diffusers.utils.logging.enable_propagation()
        with caplog.at_level(logging.INFO):
            pipe.load_lora_weights(str(file))
        diffusers.utils.logging.disable_propagation()
        got, fused = {}, {}
        for part in models:
            state = getattr(pipe, part).state_dict()
            got[part] = {
                k.split('.lora_B')[0] for k, x in state.items() if 'lora_B' in k and x.any()
            }
        pipe.fuse_lora(components=[*models])
        for part in models:
            state = getattr(pipe, part).state_dict()
            fused[part] = {
                k.replace('.base_layer', ''): x.numpy().copy()
                for k, x in state.items()
                if 'lora_' not in k
            }
        pipe.unfuse_lora(components=[*models])
        return got, fused

    yield loads
    for pipe in loaded:
        pipe.unload_lora_weights()


def small_adapters(models, rank):
    pairs = {}
    for part, params in models.items():
        targets = lora.LCM_TARGETS if part == 'unet' else lora_dialects.TEXT_TARGETS
        shapes = jax.eval_shape(
            lambda key, p=params, t=targets: lora.init(key, p, rank, t), jax.random.key(0)
        )
        pairs[part] = randomised(shapes, 0.5)
    return pairs


@pytest.mark.filterwarnings('error::RuntimeWarning')  # peft's, about what a file lacks
@pytest.mark.parametrize('kind', UNETS)
@pytest.mark.parametrize('dialect', WRITTEN)
@pytest.mark.parametrize('alpha', [3, 1.5])
def test_diffusers_reads_our_files_whole(tmp_path, caplog, diffusers_loads, kind, dialect, alpha):
    """No module missing, unexpected or ignored, and fused weights are our merged ones."""
    if (kind, dialect) == ('sd', 'kohya-sgm'):
        pytest.skip("diffusers' pipeline of SD 1 and 2 does not know the original names")
    models, file = small_pipeline(kind)[1], tmp_path / 'lora.safetensors'
    pairs = small_adapters(models, 3)
    write_lora(file, pairs, models, alpha=alpha, dialect=dialect, dtype=np.float32)
    got, fused = diffusers_loads(kind, file)
    assert not re.search(r'missing|unexpected|ignore|not found', caplog.text, re.I), caplog.text
    for part, pair in pairs.items():
        ours = {path.removesuffix('/kernel').replace('/', '.') for path in pair}
        short = {name.removeprefix('text_model.') for name in ours}
        assert {name.removeprefix('text_model.') for name in got[part]} == short
        before = weights.dump(models[part])
        for key, want in weights.dump(lora.merge(models[part], [(pair, 1.0)])).items():
            theirs = fused[part].get(key, fused[part].get(key.removeprefix('text_model.')))
            np.testing.assert_allclose(theirs, want, rtol=1e-4, atol=1e-5, err_msg=key)
            if not np.array_equal(want, before[key]):
                assert relative(theirs - before[key], want - before[key]) < 1e-3, key
    print(f'{kind} {dialect}: {sum(map(len, got.values()))} of {sum(map(len, pairs.values()))}')


@pytest.mark.parametrize('kind', ['sd', 'sdxl'])
@pytest.mark.parametrize('dialect', lora_dialects.DIALECTS)
def test_what_diffusers_drops_of_other_files(tmp_path, diffusers_loads, kind, dialect):
    """`lora check` tells what diffusers does, and we read the whole."""
    from lcm_jax.lora_files.programs import dropped

    models, file = small_pipeline(kind)[1], tmp_path / 'lora.safetensors'
    tensors = lora_dialects.DIALECTS[dialect](lora_dialects.peft(models, rank=2))
    write_tensors(file, tensors)
    spots = {part: files.modules(params) for part, params in models.items()}
    found = files.locate(tensors, spots, file)
    ours, _ = read_lora(file, models)
    assert sum(map(len, ours.values())) == len(found) == len([*lora_dialects.adapted(models)])
    drops = dropped('diffusers', found, spots)
    try:
        got, fused = diffusers_loads(kind, file)
    except Exception:  # of whole files in strange names; the type depends on the first strange one
        assert {spot.split()[1] for spot in drops} >= {m for c, m in found if c == 'unet'}
        return
    assert sum(map(len, got.values())) == len(found) - len(drops)
    kept = {
        path
        for _, path, module, _ in lora_dialects.adapted(models)
        if f'unet {module}' not in drops
    }
    adapter = {path: ours['unet'][path] for path in kept & ours['unet'].keys()}
    want = weights.dump(lora.merge(models['unet'], [(adapter, 1.0)]))
    assert relative(fused['unet'], {k: want[k] for k in fused['unet']}) < 1e-5


# Other methods than plain LoRA

CONV = 'lora_unet_mid_block_resnets_0_conv1'
TO_Q = 'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q'
TO_K = 'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k'


def draw(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def kron(a, b):
    return np.kron(a.reshape(*a.shape, *[1] * (b.ndim - 2)), b)


def tucker(t, a, b):
    """LyCORIS' rebuild_tucker."""
    return torch.einsum('ijkl,jr,ip->prkl', *map(torch.tensor, (t, b, a))).numpy()


def lycoris():
    """name -> (key of the module, its tensors, the update as LyCORIS' documentation has it)."""
    w1a, w1b, w2a, w2b = draw(16, 2), draw(2, 144), draw(16, 2) + 1, draw(2, 144) - 1
    loha = dict(
        zip(('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'), (w1a, w1b, w2a, w2b), strict=True)
    )
    t1, t2, a, b = draw(2, 2, 3, 3), draw(2, 2, 3, 3) + 1, draw(2, 16), draw(2, 16) - 1
    k1, k2 = draw(4, 2), draw(4, 8, 3, 3)
    down, up, mid = draw(3, 16, 1, 1), draw(16, 2, 1, 1), draw(2, 3, 3, 3)
    wide = [draw(16, 6), draw(6, 12), draw(16, 6) + 1, draw(6, 12)]
    return {
        'locon': (
            CONV,
            {'lora_down.weight': down, 'lora_up.weight': up, 'lora_mid.weight': mid, 'alpha': 3},
            torch.einsum(
                'pqkl,qi,op->oikl', *map(torch.tensor, (mid, down[..., 0, 0], up[..., 0, 0]))
            ).numpy(),
        ),
        'loha': (
            CONV,
            loha | {'alpha': 1},
            0.5 * ((w1a @ w1b) * (w2a @ w2b)).reshape(16, 16, 3, 3),
        ),
        'loha of a high rank': (
            TO_K,
            {**dict(zip(loha, wide, strict=True)), 'alpha': 6},
            (wide[0] @ wide[1]) * (wide[2] @ wide[3]),
        ),
        'loha, tucker': (
            CONV,
            dict(zip((*loha, 'hada_t1', 'hada_t2'), (a, b, b, a, t1, t2), strict=True))
            | {'alpha': 4},
            2 * tucker(t1, a, b) * tucker(t2, b, a),
        ),
        'lokr, whole': (CONV, {'lokr_w1': k1, 'lokr_w2': k2, 'alpha': 9}, kron(k1, k2)),
        'lokr': (
            TO_K,
            {'lokr_w1': k1, 'lokr_w2_a': w1a[:4], 'lokr_w2_b': w1b[:, :6], 'alpha': 1},
            0.5 * kron(k1, w1a[:4] @ w1b[:, :6]),
        ),
        'lokr, both as factors': (
            TO_K,
            {
                'lokr_w1_a': w1a[:4],
                'lokr_w1_b': w1b[:, :3],
                'lokr_w2_a': w2a[:4, :1],
                'lokr_w2_b': w2b[:1, :4],
                'alpha': 3,
            },
            3 * kron(w1a[:4] @ w1b[:, :3], w2a[:4, :1] @ w2b[:1, :4]),
        ),
        'lokr, tucker': (
            CONV,
            {
                'lokr_w1': k1,
                'lokr_w2_a': a[:, :4],
                'lokr_w2_b': b[:, :8],
                'lokr_t2': t1,
                'alpha': 2,
            },
            kron(k1, tucker(t1, a[:, :4], b[:, :8])),
        ),
    }


@pytest.mark.parametrize('case', lycoris())
def test_lycoris(tmp_path, case):
    name, tensors, want = lycoris()[case]
    tensors = {f'{name}.{leaf}': np.array(x, np.float32, order='C') for leaf, x in tensors.items()}
    write_tensors(tmp_path / 'f', tensors)
    (path, ab), *more = read(tmp_path / 'f').items()
    delta = lora.delta(ab)
    assert (
        not more
        and relative(delta, want.T if want.ndim == 2 else want.transpose(2, 3, 1, 0)) < 1e-5
    )
    assert ab['down'].shape[-1] <= 16  # it fits the layer
    write(tmp_path / 'g', {path: ab}, dtype=np.float32)
    assert relative(lora.delta(read(tmp_path / 'g')[path]), delta) < 1e-6


@pytest.mark.parametrize('alpha', [np.float32(1e5), np.float16(np.inf)])
def test_an_alpha_that_means_nothing_is_left_aside(tmp_path, alpha):
    """LyCORIS writes one with LoKr matrices that have no rank; half precision does not hold it."""
    tensors = {f'{CONV}.lokr_w1': draw(4, 2), f'{CONV}.lokr_w2': draw(4, 8, 3, 3)}
    write_tensors(tmp_path / 'f.safetensors', tensors | {f'{CONV}.alpha': np.asarray(alpha)})
    write_tensors(tmp_path / 'g.safetensors', tensors)
    said = describe.inspect_lora(tmp_path / 'f.safetensors')
    assert 'alpha       not in the file; taken as the rank' in said
    jax.tree.map(
        np.testing.assert_array_equal, *(read(tmp_path / f'{x}.safetensors') for x in 'fg')
    )


@pytest.mark.parametrize('rslora', [False, True])
def test_what_peft_saves_of_its_own(tmp_path, rslora):
    """base_model.model names, alpha in adapter_config.json, rank_pattern, alpha_pattern, rsLoRA."""
    import peft

    unet = diffusers.UNet2DConditionModel.from_config(configs.unet_config(SPEC, 8))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=['to_q', 'to_k', 'conv1', 'proj_in', 'ff.net.2'],
        rank_pattern={'to_q': 2},
        alpha_pattern={'attn1.to_q': 3, 'conv1': 5},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    before = {k: x.clone() for k, x in unet.state_dict().items()}
    net = peft.get_peft_model(unet, config)
    net.save_pretrained(tmp_path)
    ab = read(tmp_path / 'adapter_model.safetensors')
    merged = net.merge_and_unload().state_dict()
    want = {k: (x - before[k]).numpy() for k, x in merged.items() if not torch.equal(x, before[k])}
    got = weights.dump({path: lora.delta(x) for path, x in ab.items()})
    assert len(got) == len(want) == len(ab)
    for key, x in want.items():
        assert relative(got[key], x) < 1e-5, key
