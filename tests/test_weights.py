"""Files <-> parameters: byte-exact both ways, one clear error for each bad input, full-size key sets."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lcm_jax import tree, weights
from lcm_jax.errors import InputError
from lcm_jax.models import configs, shapes
from lcm_jax.models.clip import VisionSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec
from lcm_jax.models.zoo import MODELS
from lcm_jax.tensors import read_json, read_tensors, write_tensors

SMALL = UNetSpec(
    widths=(8, 16),
    down=((0,), (1,)),
    mid=1,
    up=((1, 1), (0, 0)),
    heads=(1, 2),
    context_dim=6,
    groups=4,
)
VISION = VisionSpec(width=8, layers=1, heads=2, mlp=16, projection=4, size=8, patch=4)


def random_params(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)


@pytest.fixture(scope='module')
def small():
    abstract = shapes.unet_shapes(SMALL)
    return abstract, weights.dump(random_params(abstract))


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_params_to_file_and_back_to_the_last_bit(dtype, tmp_path):
    kind, vae = jnp.dtype(dtype), VAESpec(widths=(8,), resnets=1, groups=4)
    for abstract in (
        shapes.unet_shapes(SMALL, kind),
        shapes.vae_shapes(vae, kind),
        shapes.vision_shapes(VISION, kind),
    ):
        params = random_params(abstract)
        file = tmp_path / 'new' / 'model.safetensors'
        write_tensors(file, weights.dump(params), {'made': 'here'})
        tensors, metadata = read_tensors(file)
        assert metadata == {'format': 'pt', 'made': 'here'}
        back = weights.load(abstract, tensors, file)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
            assert b.dtype == dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        again = weights.dump(back)
        assert {k: v.tobytes() for k, v in again.items()} == {
            k: v.tobytes() for k, v in tensors.items()
        }
        assert [p.name for p in file.parent.iterdir()] == [file.name]  # no partial file left


def test_load_casts_to_the_dtype_asked_for(small):
    abstract, tensors = small
    half = {key: x.astype(np.float16) for key, x in tensors.items()}
    assert {x.dtype for x in jax.tree.leaves(weights.load(abstract, half))} == {np.dtype('float32')}


def test_vae_files_of_stable_diffusion_1(tmp_path):
    """The published files name the attention query, key, value, proj_attn; diffusers reads them so too."""
    spec = VAESpec(widths=(8, 16), resnets=1, groups=4)
    params = random_params(shapes.vae_shapes(spec))
    old = weights.dump(params)
    for new, name in (
        ('to_q', 'query'),
        ('to_k', 'key'),
        ('to_v', 'value'),
        ('to_out.0', 'proj_attn'),
    ):
        old = {key.replace(f'.{new}.', f'.{name}.'): x for key, x in old.items()}
    assert sum('.query.' in key for key in old) == 4
    jax.tree.map(np.testing.assert_array_equal, weights.load(shapes.vae_shapes(spec), old), params)


def test_a_name_and_its_alias_together_are_unexpected(small):
    abstract, tensors = small
    key = next(k for k in tensors if '.to_q.' in k)
    alias = key.replace('to_q', 'query')
    with pytest.raises(InputError, match=r'1 unexpected.*query'):
        weights.load(abstract, tensors | {alias: tensors[key]})


def fails(abstract, tensors):
    with pytest.raises(InputError) as e:
        weights.load(abstract, tensors, source='some/unet.safetensors')
    assert 'some/unet.safetensors' in str(e.value) and '\n' not in str(e.value)
    return str(e.value)


def test_missing_tensors(small):
    abstract, tensors = small
    gone = sorted(tensors)[:5]
    said = fails(abstract, {k: x for k, x in tensors.items() if k not in gone})
    assert f'model of {len(tensors)} tensors' in said
    assert f'5 missing: {", ".join(gone[:3])}, ...' in said and gone[3] not in said
    assert 'unexpected' not in said and 'misshapen' not in said


def test_unexpected_tensors(small):
    abstract, tensors = small
    said = fails(abstract, tensors | {'conv_inn.weight': np.zeros(3)})
    assert "1 unexpected: conv_inn.weight (did you mean 'conv_in.weight'?)" in said


def test_misshapen_tensors(small):
    abstract, tensors = small
    said = fails(abstract, tensors | {'conv_in.weight': np.zeros((8, 9, 3, 3), np.float32)})
    assert '1 misshapen: conv_in.weight (8, 9, 3, 3) instead of (8, 4, 3, 3)' in said


def test_all_at_once(small):
    abstract, tensors = small
    bad = tensors | {'x': np.zeros(1), 'conv_in.weight': np.zeros(1)}
    del bad['conv_out.bias']
    said = fails(abstract, bad)
    assert (
        '1 missing: conv_out.bias' in said
        and '1 unexpected: x' in said
        and '1 misshapen: conv_in' in said
    )


def test_unreadable_files(small, tmp_path):
    _, tensors = small
    file = tmp_path / 'unet.safetensors'
    with pytest.raises(InputError, match=r'no such file.*unet\.safetensors'):
        read_tensors(file)
    write_tensors(file, tensors)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], 'little')
    for content in (b'', b'<html>not found</html>', whole[:-1], whole[: header // 2], whole + b'x'):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r'unet\.safetensors is not a readable') as e:
            read_tensors(file)
        assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='no such file'):
        read_tensors(tmp_path)  # a folder


def test_unreadable_json(tmp_path):
    file = tmp_path / 'config.json'
    with pytest.raises(InputError, match=r'config\.json'):
        read_json(file)
    for content in (b'', b'{"a": 1', b'\xff\xfe'):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r'cannot read .*config\.json'):
            read_json(file)


# --- full size: names and shapes are those of diffusers and transformers, and nothing is allocated


def assert_same_names_and_shapes(abstract, model):
    ours = weights.keys(abstract)
    reference = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    if isinstance(model, transformers.CLIPTextModel):  # without the prefix since transformers 5
        reference = {
            'text_model.' + key.removeprefix('text_model.'): x for key, x in reference.items()
        }
    assert ours == reference
    assert tree.count(abstract) == sum(np.prod(shape, dtype=int) for shape in reference.values())


@pytest.mark.parametrize(
    ('name', 'tensors', 'parameters'),
    [
        ('sd15', 686, 859_520_964),
        ('sd21', 686, 865_910_724),
        ('sdxl', 1680, 2_567_463_684),
        ('ssd1b', 944, 1_331_334_404),
    ],
)
def test_full_size_unet(name, tensors, parameters):
    spec = MODELS[name].unet
    abstract = shapes.unet_shapes(spec)
    assert (len(weights.keys(abstract)), tree.count(abstract)) == (tensors, parameters)
    with torch.device('meta'):
        model = diffusers.UNet2DConditionModel.from_config(configs.unet_config(spec, 64))
    assert_same_names_and_shapes(abstract, model)


@pytest.mark.parametrize('name', ['sd15', 'sdxl'])
def test_full_size_vae(name):
    spec = MODELS[name].vae
    with torch.device('meta'):
        model = diffusers.AutoencoderKL.from_config(configs.vae_config(spec, 512))
    assert_same_names_and_shapes(shapes.vae_shapes(spec), model)
    assert len(model.state_dict()) == 248


@pytest.mark.parametrize(
    ('name', 'number', 'tensors'),
    [('sd15', 0, 196), ('sd21', 0, 372), ('sdxl', 1, 517)],
    ids=['CLIP-L', 'OpenCLIP-H', 'OpenCLIP-bigG'],
)
def test_full_size_text_encoder(name, number, tensors):
    spec = MODELS[name].text[number]
    cls = (
        transformers.CLIPTextModelWithProjection if spec.projection else transformers.CLIPTextModel
    )
    with torch.device('meta'):
        model = cls(transformers.CLIPTextConfig(**configs.text_config(spec)))
    assert_same_names_and_shapes(shapes.text_shapes(spec), model)
    assert len(model.state_dict()) == tensors


def test_full_size_image_encoder():
    spec = VisionSpec(width=1024, layers=24, heads=16, mlp=4096, projection=768, patch=14)  # CLIP-L
    with torch.device('meta'):
        model = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**configs.vision_config(spec))
        )
    assert_same_names_and_shapes(shapes.vision_shapes(spec), model)
