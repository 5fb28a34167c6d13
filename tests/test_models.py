"""Every network against diffusers or transformers in float32, through files in both directions."""

import dataclasses
import json
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lcm_jax import weights
from lcm_jax.errors import InputError
from lcm_jax.models import configs, shapes
from lcm_jax.models.clip import ImageEncoder, TextEncoder
from lcm_jax.models.tiny import TinySpec, autoencoder
from lcm_jax.models.unet import UNet
from lcm_jax.models.vae import VAE
from lcm_jax.models.zoo import MODELS
from lcm_jax.tensors import read_json, read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures('quick_compiler')
TOLERANCE = 1e-5  # of the largest reference value; about 1e-6 is reached


@pytest.fixture(autouse=True)
def float32():
    with jax.default_matmul_precision('float32'):
        yield


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomise(model, seed=0):
    """Every parameter at random, norms and biases too, such that activations stay of order one."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            value = 0.3 * rng.normal(size=p.shape) + ('norm' in name and name.endswith('weight'))
        elif 'embedding' in name and 'patch' not in name and p.ndim == 2:
            value = rng.normal(size=p.shape)
        else:
            value = rng.normal(size=p.shape) / np.sqrt(p[0].numel())
        p.data = torch.tensor(value, dtype=torch.float32)
    return model.eval()


def theirs(fn, *args, **kwargs):
    """Call torch with numpy arrays."""

    def to_torch(x):
        return torch.tensor(x) if isinstance(x, np.ndarray) else x

    with torch.no_grad():
        return fn(*map(to_torch, args), **jax.tree.map(to_torch, kwargs))


def assert_close(what, ours, reference):
    reference = reference.numpy()
    assert ours.shape == reference.shape
    error = np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()
    print(f'{what}: max difference {error:.1e} of the largest value')
    assert error <= TOLERANCE


def from_disk(model, folder, spec_of, shapes_of):
    """What diffusers or transformers saved -> our spec and parameters."""
    model.save_pretrained(folder)
    (file,) = folder.glob('*.safetensors')
    spec = spec_of(read_json(folder / 'config.json'))
    tensors, _ = read_tensors(file)
    return spec, weights.load(shapes_of(spec), tensors, file)


def to_disk(model, folder, config, params):
    """Our config and parameters, loaded by the class of `model`, are `model` to the last bit."""
    name = 'model' if isinstance(model, transformers.PreTrainedModel) else 'diffusion_pytorch_model'
    write_tensors(folder / f'{name}.safetensors', weights.dump(params))
    (folder / 'config.json').write_text(json.dumps(config))
    back, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert back.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, 1)


SD15 = {
    'block_out_channels': (16, 32, 48, 48),
    'layers_per_block': 1,
    'cross_attention_dim': 24,
    'attention_head_dim': 4,
    'norm_num_groups': 8,
    'sample_size': 8,
}
SDXL = {
    'block_out_channels': (16, 32, 48),
    'layers_per_block': 2,
    'cross_attention_dim': 24,
    'attention_head_dim': (1, 2, 4),
    'norm_num_groups': 8,
    'sample_size': 8,
    'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
    'transformer_layers_per_block': (1, 2, 3),
    'use_linear_projection': True,
    'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 8,
    'projection_class_embeddings_input_dim': 20 + 6 * 8,
}
UNETS = {  # name: (config, latent grid)
    'sd15': (SD15, (8, 16)),
    'sd15, sides not divisible': (SD15, (9, 14)),
    'sd2': (SD15 | {'attention_head_dim': (2, 4, 6, 6), 'use_linear_projection': True}, (8, 8)),
    'sdxl': (SDXL, (8, 12)),
    'ssd1b': (
        SDXL
        | {
            'mid_block_type': 'UNetMidBlock2D',
            'transformer_layers_per_block': [1, [2, 2], [1, 2]],
            'reverse_transformer_layers_per_block': [[1, 1, 3], [2, 1, 1], 1],
        },
        (8, 8),
    ),
    'lcm, with w': (
        SD15
        | {
            'time_cond_proj_dim': 12,
            'layers_per_block': (1, 2, 1, 1),
            'in_channels': 5,
            'out_channels': 3,
        },
        (8, 8),
    ),
}


@pytest.mark.parametrize('name', UNETS)
def test_unet(name, tmp_path):
    config, (h, w) = UNETS[name]
    model = randomise(diffusers.UNet2DConditionModel(**config))
    spec, params = from_disk(model, tmp_path / 'theirs', configs.unet_spec, shapes.unet_shapes)
    z, context = random(1, 2, spec.in_channels, h, w), random(2, 2, 7, spec.context_dim)
    t, cond, added = np.array([981.0, 3.0], np.float32), {}, None
    guidance = random(3, 2, spec.w_dim) if spec.w_dim else None
    if spec.pooled_dim:
        cond = {
            'pooled': random(4, 2, spec.pooled_dim),
            'sizes': np.array(
                [[1024, 768, 0, 16, 1024, 1024], [512, 600, 8, 0, 640, 512]], np.float32
            ),
        }
        added = {'text_embeds': cond['pooled'], 'time_ids': cond['sizes']}
    reference = theirs(model, z, t, context, timestep_cond=guidance, added_cond_kwargs=added).sample
    ours = jax.jit(UNet(spec).apply)({'params': params}, nhwc(z), t, context, w=guidance, **cond)
    assert_close(f'UNet {name}', nchw(ours), reference)
    to_disk(model, tmp_path / 'ours', configs.unet_config(spec, 8), params)


@pytest.mark.parametrize(
    'config',
    [
        {'block_out_channels': (16, 24, 32), 'layers_per_block': 2, 'norm_num_groups': 8},
        {
            'block_out_channels': (16, 32),
            'layers_per_block': 1,
            'norm_num_groups': 4,
            'latent_channels': 3,
            'scaling_factor': 0.5,
        },
    ],
    ids=['3 levels', '2 levels'],
)
def test_vae(config, tmp_path):
    n = len(config['block_out_channels'])
    model = randomise(
        diffusers.AutoencoderKL(
            **config,
            down_block_types=('DownEncoderBlock2D',) * n,
            up_block_types=('UpDecoderBlock2D',) * n,
        )
    )
    spec, params = from_disk(model, tmp_path / 'theirs', configs.vae_spec, shapes.vae_shapes)
    x = random(1, 2, 3, 5 * spec.factor, 3 * spec.factor)
    latents = theirs(model.encode, x).latent_dist
    mean, logvar = jax.jit(lambda p, x: VAE(spec).apply({'params': p}, x, method='encode'))(
        params, nhwc(x)
    )
    assert_close('VAE encode, mean', nchw(mean), latents.mean)
    assert_close('VAE encode, logvar', nchw(logvar), latents.logvar)
    z = random(2, 2, spec.latent_channels, 5, 3)
    decode = jax.jit(lambda p, z: VAE(spec).apply({'params': p}, z, method='decode'))
    assert_close('VAE decode', nchw(decode(params, nhwc(z))), theirs(model.decode, z).sample)
    to_disk(model, tmp_path / 'ours', configs.vae_config(spec, 32), params)


def test_tiny_vae(tmp_path):
    sizes = {'encoder_block_out_channels': (8,) * 3, 'decoder_block_out_channels': (12,) * 3}
    blocks = {'num_encoder_blocks': (1, 2, 3), 'num_decoder_blocks': (3, 2, 1)}
    model = randomise(diffusers.AutoencoderTiny(**sizes, **blocks))
    spec, params = from_disk(model, tmp_path / 'theirs', configs.vae_spec, shapes.vae_shapes)
    x, z = random(1, 2, 3, 5 * spec.factor, 3 * spec.factor), 3 * random(2, 2, 4, 5, 3)

    @partial(jax.jit, static_argnums=2)
    def ours(params, x, method):
        return autoencoder(spec).apply({'params': params}, nhwc(x), method=method)

    mean, logvar = ours(params, x, 'encode')
    assert_close('tiny encode', nchw(mean), theirs(model.encode, x).latents)
    assert mean.shape == logvar.shape and (logvar <= -30).all()
    assert_close('tiny decode', nchw(ours(params, z, 'decode')), theirs(model.decode, z).sample)
    to_disk(model, tmp_path / 'ours', configs.vae_config(spec, 32), params)


def test_taesd_at_full_size():
    with torch.device('meta'):
        model = diffusers.AutoencoderTiny()
    shapes_of = {k: tuple(x.shape) for k, x in model.state_dict().items()}
    assert weights.keys(shapes.vae_shapes(TinySpec())) == shapes_of


IDS = np.array([[98, 5, 7, 20, 99, 99, 99, 99], [98, 9, 3, 2, 11, 4, 99, 1]], np.int32)


@pytest.mark.parametrize('projected', [False, True])
@pytest.mark.parametrize(('act', 'eos'), [('quick_gelu', 2), ('gelu', 99), ('gelu', 7)])
def test_text_encoder(projected, act, eos, tmp_path):
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = randomise(
        cls(
            transformers.CLIPTextConfig(
                vocab_size=100,
                hidden_size=32,
                intermediate_size=72,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=10,
                projection_dim=20,
                hidden_act=act,
                bos_token_id=98,
                pad_token_id=1,
                eos_token_id=eos,
            )
        )
    )
    spec, params = from_disk(model, tmp_path / 'theirs', configs.text_spec, shapes.text_shapes)
    reference = theirs(model, IDS, output_hidden_states=True)
    ours = jax.jit(TextEncoder(spec).apply)({'params': params}, IDS)
    assert_close('text, hidden', ours.hidden, reference.last_hidden_state)
    assert_close('text, penultimate', ours.penultimate, reference.hidden_states[-2])
    pooled = reference.text_embeds if projected else reference.pooler_output
    assert_close('text, pooled', ours.pooled, pooled)
    to_disk(model, tmp_path / 'ours', configs.text_config(spec), params)


def test_text_encoder_reads_the_published_names(tmp_path):
    """transformers 5 drops `text_model.` from CLIPTextModel's names; the files on the hub have it."""
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=100,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    spec, params = from_disk(model, tmp_path, configs.text_spec, shapes.text_shapes)
    dumped = weights.dump(params)
    assert dumped.keys() == {
        'text_model.' + key.removeprefix('text_model.') for key in model.state_dict()
    }
    published = dumped | {'text_model.embeddings.position_ids': np.arange(77)[None]}
    jax.tree.map(
        np.testing.assert_array_equal, weights.load(shapes.text_shapes(spec), published), params
    )


@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
def test_image_encoder(act, tmp_path):
    model = randomise(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=72,
                num_hidden_layers=2,
                num_attention_heads=4,
                hidden_act=act,
                image_size=24,
                patch_size=8,
                projection_dim=20,
            )
        )
    )
    spec, params = from_disk(model, tmp_path / 'theirs', configs.vision_spec, shapes.vision_shapes)
    x = random(1, 2, 3, 24, 24)
    ours = jax.jit(ImageEncoder(spec).apply)({'params': params}, nhwc(x))
    assert_close('image embedding', ours, theirs(model, x).image_embeds)
    to_disk(model, tmp_path / 'ours', configs.vision_config(spec), params)


def test_bfloat16_stays_bfloat16():
    """Precision follows the data: no layer promotes silently."""
    spec = configs.unet_spec(SDXL)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), shapes.unet_shapes(spec))

    def half(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    out = jax.eval_shape(
        UNet(spec).apply,
        {'params': params},
        half(1, 8, 8, 4),
        jnp.zeros(1),
        half(1, 7, 24),
        pooled=half(1, 20),
        sizes=jnp.zeros((1, 6)),
    )
    assert out.dtype == jnp.bfloat16


# Published config.json files: the keys that say something.
PUBLISHED = {
    'sd15': {
        'block_out_channels': [320, 640, 1280, 1280],
        'layers_per_block': 2,
        'attention_head_dim': 8,
        'cross_attention_dim': 768,
        'sample_size': 64,
        'mid_block_scale_factor': 1,
        'norm_eps': 1e-05,
        'down_block_types': ['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D'],
        'up_block_types': ['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 3,
    },
    'sdxl': {
        'block_out_channels': [320, 640, 1280],
        'layers_per_block': 2,
        'attention_head_dim': [5, 10, 20],
        'cross_attention_dim': 2048,
        'sample_size': 128,
        'use_linear_projection': True,
        'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
        'up_block_types': ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
        'transformer_layers_per_block': [1, 2, 10],
        'addition_embed_type': 'text_time',
        'addition_time_embed_dim': 256,
        'projection_class_embeddings_input_dim': 2816,
        'num_attention_heads': None,
        'reverse_transformer_layers_per_block': None,
        'time_cond_proj_dim': None,
    },
}
PUBLISHED['sd21'] = PUBLISHED['sd15'] | {
    'attention_head_dim': [5, 10, 20, 20],
    'cross_attention_dim': 1024,
    'sample_size': 96,
    'use_linear_projection': True,
    'upcast_attention': True,
    'dual_cross_attention': False,
    'only_cross_attention': False,
    'num_class_embeds': None,
}
PUBLISHED['ssd1b'] = PUBLISHED['sdxl'] | {
    'mid_block_type': 'UNetMidBlock2D',
    'transformer_layers_per_block': [0, [2, 2], [4, 4]],
    'reverse_transformer_layers_per_block': [[4, 4, 10], [2, 1, 1], 0],
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_config_is_the_row(name):
    assert configs.unet_spec(PUBLISHED[name]) == MODELS[name].unet


@pytest.mark.parametrize('idle', [0, 1, [0, 0], [1, 1]])
def test_unused_depths_may_be_spelt_in_any_way(idle):
    config = PUBLISHED['ssd1b'] | {
        'transformer_layers_per_block': [idle, [2, 2], [4, 4]],
        'reverse_transformer_layers_per_block': [[4, 4, 10], [2, 1, 1], idle],
    }
    spec = configs.unet_spec(config)
    assert spec == MODELS['ssd1b'].unet
    with torch.device('meta'):
        model = diffusers.UNet2DConditionModel.from_config(config)
    assert len(model.state_dict()) == 944


SPECS = {
    **{
        f'{name} unet': (m.unet, configs.unet_spec, lambda s: configs.unet_config(s, 64))
        for name, m in MODELS.items()
    },
    **{
        f'{name} vae': (m.vae, configs.vae_spec, lambda s: configs.vae_config(s, 512))
        for name, m in MODELS.items()
    },
    **{
        f'{name} text {i}': (spec, configs.text_spec, configs.text_config)
        for name, m in MODELS.items()
        for i, spec in enumerate(m.text)
    },
    'uneven': (
        dataclasses.replace(
            MODELS['sdxl'].unet,
            down=((0, 0), (1, 2), (10, 10)),
            up=((10, 10, 10), (2, 2, 1), (0, 0, 0)),
        ),
        configs.unet_spec,
        lambda s: configs.unet_config(s, 64),
    ),
    'deep middle, w': (
        dataclasses.replace(MODELS['sd15'].unet, mid=3, w_dim=256),
        configs.unet_spec,
        lambda s: configs.unet_config(s, 64),
    ),
}


@pytest.mark.parametrize('name', SPECS)
def test_spec_to_config_and_back(name):
    spec, spec_of, config_of = SPECS[name]
    assert spec_of(json.loads(json.dumps(config_of(spec)))) == spec


@pytest.mark.parametrize(
    ('spec_of', 'config', 'says'),
    [
        (
            configs.unet_spec,
            PUBLISHED['sd15'] | {'class_embed_type': 'timestep'},
            "class_embed_type = 'timestep'",
        ),
        (configs.unet_spec, PUBLISHED['sd15'] | {'mid_block_type': None}, 'mid_block_type = None'),
        (
            configs.unet_spec,
            PUBLISHED['sd15'] | {'down_block_types': ['ResnetDownsampleBlock2D'] * 4},
            'ResnetDownsampleBlock2D',
        ),
        (
            configs.unet_spec,
            PUBLISHED['sd15'] | {'attention_head_dim': [8, 8]},
            'has 2 entries instead of 4',
        ),
        (
            configs.unet_spec,
            PUBLISHED['sd15'] | {'cross_attention_dim': [8, 8, 8, 9]},
            'cross_attention_dim',
        ),
        (configs.unet_spec, {}, "'block_out_channels' is missing"),
        (configs.unet_spec, [], 'holds a list'),
        (
            configs.vae_spec,
            {'block_out_channels': [8], 'use_quant_conv': False},
            'use_quant_conv = False',
        ),
        (
            configs.vae_spec,
            {'_class_name': 'AutoencoderTiny', 'num_encoder_blocks': [1, 2]},
            'as many levels everywhere',
        ),
        (configs.vae_spec, {'_class_name': 'VQModel'}, "_class_name = 'VQModel'"),
        (configs.text_spec, {'architectures': ['T5EncoderModel']}, 'T5EncoderModel'),
        (configs.text_spec, {'hidden_act': 'relu'}, "hidden_act = 'relu'"),
    ],
)
def test_unsupported_configs_are_refused(spec_of, config, says):
    with pytest.raises(InputError) as e:
        spec_of(config, source='a/config.json')
    assert says in str(e.value) and 'a/config.json' in str(e.value)


def test_a_spec_that_no_config_describes():
    spec = dataclasses.replace(MODELS['sdxl'].unet, mid=1)
    with pytest.raises(InputError, match='middle of depth 1'):
        configs.unet_config(spec, 64)
