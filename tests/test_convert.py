"""Models and LoRA files from form to form: to the last bit, every file, all or nothing."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from diffusers import LCMScheduler, StableDiffusionPipeline

from lcm_jax import single
from lcm_jax.checkpoint import open_model
from lcm_jax.convert import FORMS, convert
from lcm_jax.errors import InputError
from lcm_jax.lora_files.find import LORAS
from lcm_jax.pipeline import Pipeline
from lcm_jax.single import MODEL
from lcm_jax.tensors import read_tensors, write_tensors
from lcm_jax.tree import named

UNET = 'unet/diffusion_pytorch_model.safetensors'


def files(folder):
    """{relative path: bytes} of all files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def same_tensors(a, b):
    a, b = (read_tensors(file)[0] for file in (a, b))
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert x.dtype == b[key].dtype and x.tobytes() == b[key].tobytes(), key


@pytest.fixture(scope='module')
def canonical(random_folder, tmp_path_factory):
    """The random folder in half precision, with the key names that we write."""
    folder = tmp_path_factory.mktemp('convert')
    convert(random_folder, folder / 'half', 'diffusers', 'float16')
    return folder / 'half'


def test_there_and_back_to_the_last_bit(canonical, tmp_path):
    (canonical / 'safety_checker').mkdir(exist_ok=True)
    (canonical / 'safety_checker/model.safetensors').write_bytes(b'not ours to understand')
    said = convert(canonical, tmp_path / 'new' / 'orbax')
    assert said.startswith(f'wrote {tmp_path}/new/orbax: orbax checkpoint,') and 'vae' in said
    assert files(tmp_path / 'new/orbax').keys() & files(canonical).keys()  # configs and tokenizer
    assert not [p for p in tmp_path.rglob('*.safetensors') if p.parent.name != 'safety_checker']
    assert 'diffusers folder' in convert(tmp_path / 'new/orbax', tmp_path / 'back')
    assert files(tmp_path / 'back') == files(canonical)
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['orbax']  # no temporary folder stays


@pytest.mark.parametrize('form', ['diffusers', 'orbax'])
def test_what_is_no_part_of_the_model_is_not_copied(canonical, tmp_path, form):
    source = shutil.copytree(canonical, tmp_path / 'source')
    convert(source, tmp_path / 'plain', form)
    kept = 'README.md', 'LICENSE', 'recipe.json', 'tokenizer_2/vocab.json', 'feature_extractor/x'
    others = '.git/HEAD', 'v1-5-pruned.ckpt', 'all.safetensors', 'onnx/x', 'tokenizer/.DS_Store'
    for name in kept + others:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text('x')
    convert(source, tmp_path / 'out', form)
    plain, out = (
        {name for name in files(tmp_path / f) if '/params/' not in name} for f in ('plain', 'out')
    )
    assert out == plain | {*kept}


def test_the_checkpoint_is_the_tree_that_the_pipeline_has(random_folder, tmp_path):
    convert(random_folder, tmp_path / 'orbax')
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / 'orbax/unet/params')
    ours = Pipeline.load(random_folder).params['unet']
    for (path, x), (other, y) in zip(named(ours), named(tree), strict=True):
        assert path == other and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_diffusers_loads_what_comes_back(random_folder, tmp_path):
    import diffusers

    convert(random_folder, tmp_path / 'orbax')
    convert(tmp_path / 'orbax', tmp_path / 'back')
    pipes = [
        diffusers.StableDiffusionPipeline.from_pretrained(f)
        for f in (random_folder, tmp_path / 'back')
    ]
    for part in ('unet', 'vae', 'text_encoder'):
        before, after = (getattr(pipe, part).state_dict() for pipe in pipes)
        assert before.keys() == after.keys()
        assert all((x == after[key]).all() for key, x in before.items())
    same_tensors(random_folder / UNET, tmp_path / 'back' / UNET)


def test_dtype(canonical, tmp_path):
    convert(canonical, tmp_path / 'orbax', dtype='float32')
    convert(tmp_path / 'orbax', tmp_path / 'back', dtype='bfloat16')
    wide, _ = read_tensors(tmp_path / 'back' / UNET)
    assert {str(x.dtype) for x in wide.values()} == {'bfloat16'}


def test_mixed_dtypes_are_kept(canonical, tmp_path):
    source = shutil.copytree(canonical, tmp_path / 'source')
    mix_dtypes(source)
    last = source
    for name in ('orbax', 'x.safetensors', 'back'):
        convert(last, tmp_path / name)
        last = tmp_path / name
    same_tensors(source / UNET, last / UNET)
    assert read_tensors(last / UNET)[0]['conv_in.bias'].dtype == np.float32


def test_q_k_and_v_of_several_dtypes_are_joined(tiny_folder, tmp_path):
    """OpenCLIP's text encoders have them as one tensor."""
    source = shutil.copytree(tiny_folder('sd2')[0], tmp_path / 'source')
    file = next((source / 'text_encoder').glob('*.safetensors'))
    tensors, _ = read_tensors(file)
    tensors = {
        k: x.astype(np.float16 if '.q_proj.' in k else np.float32) for k, x in tensors.items()
    }
    write_tensors(file, tensors)
    convert(source, tmp_path / 'x.safetensors')
    found = open_model(tmp_path / 'x.safetensors').tensors('text_encoder')
    for key, x in tensors.items():
        np.testing.assert_array_equal(np.asarray(found[key]), x.astype(np.float32))


def break_file(folder):
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-8])


def drop_tensor(folder):
    tensors, _ = read_tensors(folder / UNET)
    tensors.pop('conv_in.bias')
    write_tensors(folder / UNET, tensors)


def break_tensor(folder):
    tensors, _ = read_tensors(folder / UNET)
    tensors['conv_in.bias'][0] = np.inf
    write_tensors(folder / UNET, tensors)


def mix_dtypes(folder):
    tensors, _ = read_tensors(folder / UNET)
    write_tensors(
        folder / UNET, tensors | {'conv_in.bias': tensors['conv_in.bias'].astype(np.float32)}
    )


@pytest.mark.parametrize('family', tiny.MODELS)
def test_every_form_to_every_form_to_the_last_bit(family, tiny_folder, tmp_path):
    """Names, shapes, dtypes and bytes of weights; the texts beside them, too."""
    folder, expected = tiny_folder(family)
    last = folder
    for name in ('x.safetensors', 'orbax', 'y.safetensors', 'diffusers'):
        convert(last, tmp_path / name, name if name in FORMS else None)
        last = tmp_path / name
    assert files(last) == files(folder)
    assert open_model(tmp_path / 'x.safetensors').scheduler == open_model(folder).scheduler
    assert (tmp_path / 'x.safetensors').read_bytes() == (tmp_path / 'y.safetensors').read_bytes()
    for part in expected:
        same_tensors(*(next((f / part).glob('*.safetensors')) for f in (folder, last)))


def test_another_tokenizer_travels_in_the_single_file(random_folder, tmp_path):
    convert(random_folder, tmp_path / 'x.safetensors')
    assert 'tokenizer/tokenizer.json' in read_tensors(tmp_path / 'x.safetensors')[1][MODEL]
    prompts = ['a red heart, noto emoji']
    ours, theirs = (open_model(m).tokenizer() for m in (tmp_path / 'x.safetensors', random_folder))
    np.testing.assert_array_equal(ours(prompts), theirs(prompts))
    assert ours.length == theirs.length


def test_a_projection_of_the_text_encoder_is_kept(tiny_folder, tmp_path):
    """A CLIPTextModelWithProjection in SD 1's place, which other programs' files hold for nothing."""
    source, file = shutil.copytree(tiny_folder('sd1')[0], tmp_path / 'source'), 'text_encoder/model'
    found, _ = read_tensors(source / f'{file}.safetensors')
    found['text_projection.weight'] = np.ones((24, 64), np.float16)
    write_tensors(source / f'{file}.safetensors', found)
    config = json.loads((source / 'text_encoder/config.json').read_text())
    config |= {'architectures': ['CLIPTextModelWithProjection'], 'projection_dim': 24}
    (source / 'text_encoder/config.json').write_text(json.dumps(config))
    convert(source, tmp_path / 'x.safetensors')
    convert(tmp_path / 'x.safetensors', tmp_path / 'back')
    same_tensors(*(f / f'{file}.safetensors' for f in (source, tmp_path / 'back')))


def test_what_has_no_place_in_a_single_file_is_said(tmp_path):
    said = convert('emoji', tmp_path / 'x.safetensors')
    assert said.endswith('text_encoder; that form has no place for image_encoder')


@pytest.mark.parametrize('out', ['back', 'x.safetensors'])
def test_another_prediction_type_is_written(canonical, tmp_path, out):
    convert(canonical, tmp_path / out, prediction_type='v_prediction')
    theirs = open_model(canonical).scheduler
    assert open_model(tmp_path / out).scheduler == theirs | {'prediction_type': 'v_prediction'}


@pytest.mark.parametrize('family', ['sd1', 'sdxl'])
def test_diffusers_opens_our_single_files(family, tiny_folder, tmp_path):
    """from_single_file, offline, with the folder's configs: every weight is in its place."""
    import diffusers

    folder, expected = tiny_folder(family)
    convert(folder, tmp_path / 'x.safetensors')
    for part, cls in (('unet', 'UNet2DConditionModel'), ('vae', 'AutoencoderKL')):
        model = getattr(diffusers, cls).from_single_file(
            str(tmp_path / 'x.safetensors'),
            config=str(folder),
            subfolder=part,
            local_files_only=True,
        )
        got = model.state_dict()
        assert got.keys() == expected[part].keys()
        for key, x in expected[part].items():
            np.testing.assert_array_equal(got[key].numpy(), x.astype(np.float32))


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (shutil.rmtree, 'source. is neither a shipped model'),
        (
            lambda f: [shutil.rmtree(f / p) for p in ('unet', 'vae', 'text_encoder')],
            'nor a file, nor a diffusers folder',
        ),
        (lambda f: (f / UNET).unlink(), f'no such file: .*{UNET}'),
        (break_file, f'{UNET} is not a readable safetensors file'),
        (drop_tensor, 'unet does not fit the model of .* 1 missing: conv_in.bias'),
        (break_tensor, 'conv_in.bias holds values that are not finite'),
    ],
)
@pytest.mark.parametrize('out', ['out', 'out.safetensors'])
def test_all_or_nothing(canonical, tmp_path, damage, said, out, caplog):
    source = shutil.copytree(canonical, tmp_path / 'source')
    damage(source)
    with pytest.raises(InputError, match=said):
        convert(source, tmp_path / out)
    assert {p.name for p in tmp_path.iterdir()} <= {'source'}
    assert not caplog.records  # the error says it all


def test_a_refiner_is_no_single_file(tiny_folder, tmp_path):
    source = shutil.copytree(tiny_folder('sdxl')[0], tmp_path / 'source')
    index = json.loads((source / 'model_index.json').read_text())
    index |= {'text_encoder': [None, None], 'requires_aesthetics_score': True}
    (source / 'model_index.json').write_text(json.dumps(index))
    shutil.rmtree(source / 'text_encoder')
    with pytest.raises(
        InputError, match='source is a refiner of Stable Diffusion XL, which is not'
    ):
        convert(source, tmp_path / 'x.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['source']


def test_forms_and_targets_that_cannot_be(canonical, tmp_path):
    (tmp_path / 'there').mkdir()
    for out, options, said in (
        (tmp_path / 'there', {}, 'there exists already'),
        (canonical / 'out', {}, 'or lies in'),
        (tmp_path / 'out', {'dtype': 'float61'}, r"unknown dtype 'float61' .*'float16'.*: keep"),
        (tmp_path / 'out', {'to': 'ldm'}, "unknown form 'ldm'; one of: diffusers, original, orbax"),
        (tmp_path / 'out', {'to': 'original'}, r'out: a name ends in \.safetensors if'),
        (tmp_path / 'x.safetensors', {'to': 'orbax'}, r'a name ends in \.safetensors if'),
    ):
        with pytest.raises(InputError, match=said):
            convert(canonical, out, **options)
    assert [p.name for p in tmp_path.iterdir()] == ['there']


def test_a_damaged_checkpoint(canonical, tmp_path):
    convert(canonical, tmp_path / 'orbax')
    data = [p for p in (tmp_path / 'orbax/unet/params').rglob('d/*') if p.is_file()]
    for file in data:
        file.write_bytes(b'')
    with pytest.raises(InputError, match=r'unet/params is not a readable orbax checkpoint') as e:
        convert(tmp_path / 'orbax', tmp_path / 'out')
    assert '\n' not in str(e.value)
    shutil.rmtree(tmp_path / 'orbax/unet/params')
    (tmp_path / 'orbax/unet/params').mkdir()
    with pytest.raises(InputError, match=r'unet/params is not a readable orbax checkpoint') as e:
        convert(tmp_path / 'orbax', tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['orbax']


def test_loras_are_merged_in(random_folder, lora_file, tmp_path):
    said = convert(
        random_folder, tmp_path / 'one.safetensors', loras=[(lora_file, 0.5), (lora_file, 0.3)]
    )
    assert 'single file' in said
    live, file = Pipeline.load(random_folder), Pipeline.load(tmp_path / 'one.safetensors')
    live.add_lora(lora_file, 'a', 0.8)
    changed = 0
    for (path, x), (_, y) in zip(named(live.merged), named(file.params), strict=True):
        assert np.allclose(x, y, rtol=1e-5, atol=1e-6), path
    for x, y in zip(*(jax.tree.leaves(t) for t in (live.params, file.params)), strict=True):
        changed += not np.array_equal(x, y)
    assert changed == len(live.adapters['a'].loras['unet'])


@pytest.mark.parametrize('dtype', ['keep', 'bfloat16', 'float16'])
def test_sums_with_loras_are_rounded_once(canonical, lora_file, tmp_path, dtype):
    """The folder is in float16."""
    convert(canonical, tmp_path / 'exact', 'diffusers', 'float32', [(lora_file, 0.5)])
    convert(canonical, tmp_path / 'out', 'diffusers', dtype, [(lora_file, 0.5)])
    exact, got = (read_tensors(tmp_path / name / UNET)[0] for name in ('exact', 'out'))
    want = np.dtype('float16' if dtype == 'keep' else dtype)
    for key, x in exact.items():
        assert got[key].dtype == want and got[key].tobytes() == x.astype(want).tobytes(), key


@pytest.mark.parametrize(
    ('scale', 'dtype', 'said'),
    [
        (np.inf, 'keep', r'proj_in\.weight: with the LoRAs added it is not finite'),
        (1e7, 'float16', 'holds values that float16 cannot'),
    ],
)
def test_sums_that_are_not_finite_are_refused(
    random_folder, lora_file, tmp_path, scale, dtype, said
):
    with pytest.raises(InputError, match=said):
        convert(random_folder, tmp_path / 'out', 'diffusers', dtype, [(lora_file, scale)])
    assert not any(tmp_path.iterdir())


def test_a_single_file_that_others_cannot_guide_says_so(tiny_folder, tmp_path):
    said = convert(tiny_folder('lcm')[0], tmp_path / 'x.safetensors')
    assert said.endswith('; other programs do not know the guidance input of such a file')
    assert 'guidance input' not in convert(tiny_folder('sd1')[0], tmp_path / 'y.safetensors')


def test_a_model_with_an_acceleration_lora_in_it_says_so(random_folder, lora_file, tmp_path):
    fast = shutil.copy(lora_file, tmp_path / 'my_lcm.safetensors')
    said = convert(random_folder, tmp_path / 'fast', to='diffusers', loras=[(fast, 1.0)])
    assert said.endswith('; it draws in 2 to 8 steps of the LCM sampler, at guidance 1')
    index = json.loads((tmp_path / 'fast' / 'model_index.json').read_text())
    assert index['scheduler'] == ['diffusers', 'LCMScheduler']
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / 'fast', safety_checker=None)
    assert isinstance(theirs.scheduler, LCMScheduler)
    assert Pipeline.load(tmp_path / 'fast').schedule.few_steps
    assert not Pipeline.load(random_folder).schedule.few_steps


def test_a_lora_that_does_not_fit_leaves_nothing(random_folder, tmp_path):
    with pytest.raises(InputError, match=r'lcm_lora\.safetensors'):
        convert(random_folder, tmp_path / 'out.safetensors', loras=[(LORAS['lcm'], 1.0)])
    assert not any(tmp_path.iterdir())


def test_a_null_key_of_diffusers_makes_no_sdxl():
    """`save_pretrained` writes every key of a config, those without a value too."""
    unet = {'addition_embed_type': None}
    assert single.layout_for({'unet': unet}) == single.SD1
    assert single.layout_for({'unet': unet, 'text_encoder': {'hidden_act': 'gelu'}}) == single.SD2
    assert single.layout_for({'unet': {'addition_embed_type': 'text_time'}}) == single.SDXL


def test_what_is_not_there_is_not_named(canonical, tmp_path):
    """A hub's snapshot lacks the safety checker that its index names; diffusers would look for it."""
    source, out = shutil.copytree(canonical, tmp_path / 'source'), tmp_path / 'out'
    shutil.rmtree(source / 'safety_checker', ignore_errors=True)
    index = json.loads((source / 'model_index.json').read_text())
    index |= {
        'safety_checker': ['stable_diffusion', 'StableDiffusionSafetyChecker'],
        'feature_extractor': ['transformers', 'CLIPImageProcessor'],
        'requires_safety_checker': True,
    }
    (source / 'model_index.json').write_text(json.dumps(index))
    convert(source, out, 'diffusers')
    assert StableDiffusionPipeline.from_pretrained(out).safety_checker is None
    assert json.loads((out / 'model_index.json').read_text())['requires_safety_checker'] is False
