"""Models and LoRA files from form to form: to the last bit, every file, all or nothing."""

import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import write_random_lora

from lcm_jax import weights
from lcm_jax.checkpoint import open_model
from lcm_jax.convert import convert, convert_lora, inspect_lora
from lcm_jax.errors import InputError
from lcm_jax.lora_io import read_lora
from lcm_jax.pipeline import Pipeline
from lcm_jax.tree import named

UNET = 'unet/diffusion_pytorch_model.safetensors'


def files(folder):
    """{relative path: bytes} of all files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def same_tensors(a, b):
    a, b = (weights.read_tensors(file)[0] for file in (a, b))
    assert a.keys() == b.keys()
    for key, x in a.items():
        assert x.dtype == b[key].dtype and x.tobytes() == b[key].tobytes(), key


@pytest.fixture(scope='module')
def canonical(random_folder, tmp_path_factory):
    """The random folder in half precision, with the key names that we write."""
    folder = tmp_path_factory.mktemp('convert')
    convert(random_folder, folder / 'orbax', 'float16')
    convert(folder / 'orbax', folder / 'half')
    return folder / 'half'


def test_there_and_back_to_the_last_bit(canonical, tmp_path):
    (canonical / 'safety_checker').mkdir(exist_ok=True)
    (canonical / 'safety_checker/model.safetensors').write_bytes(b'not ours to understand')
    said = convert(canonical, tmp_path / 'new' / 'orbax')
    assert said.startswith(f'wrote {tmp_path}/new/orbax: orbax checkpoint,') and 'vae' in said
    assert not [p for p in tmp_path.rglob('*.safetensors') if p.parent.name != 'safety_checker']
    assert 'diffusers folder' in convert(tmp_path / 'new/orbax', tmp_path / 'back')
    assert files(tmp_path / 'back') == files(canonical)
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['orbax']  # no temporary folder stays


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
    convert(canonical, tmp_path / 'orbax', 'float32')
    convert(tmp_path / 'orbax', tmp_path / 'back', 'bfloat16')
    wide, _ = weights.read_tensors(tmp_path / 'back' / UNET)
    assert {str(x.dtype) for x in wide.values()} == {'bfloat16'}


def break_file(folder):
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-8])


def drop_tensor(folder):
    tensors, _ = weights.read_tensors(folder / UNET)
    tensors.pop('conv_in.bias')
    weights.write_tensors(folder / UNET, tensors)


def mix_dtypes(folder):
    tensors, _ = weights.read_tensors(folder / UNET)
    weights.write_tensors(
        folder / UNET, tensors | {'conv_in.bias': tensors['conv_in.bias'].astype(np.float32)}
    )


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (shutil.rmtree, 'no such folder: .*source'),
        (
            lambda f: [shutil.rmtree(f / p) for p in ('unet', 'vae', 'text_encoder')],
            r'neither a diffusers folder nor a checkpoint of one: of unet, .* it has \[\]',
        ),
        (lambda f: (f / 'vae/params').mkdir(), r"it has \['unet', .*\], with params/ \['vae'\]"),
        (lambda f: (f / UNET).unlink(), f'no such file: .*{UNET}'),
        (break_file, f'{UNET} is not a readable safetensors file'),
        (drop_tensor, f'{UNET} does not fit the model of .* 1 missing: conv_in.bias'),
        (mix_dtypes, r' holds both float16 and float32; choose one dtype'),
    ],
)
def test_all_or_nothing(canonical, tmp_path, damage, said):
    source = shutil.copytree(canonical, tmp_path / 'source')
    damage(source)
    with pytest.raises(InputError, match=said):
        convert(source, tmp_path / 'out')
    assert {p.name for p in tmp_path.iterdir()} <= {'source'}


def test_a_damaged_checkpoint_and_an_existing_target(canonical, tmp_path):
    convert(canonical, tmp_path / 'orbax')
    with pytest.raises(InputError, match='orbax exists already'):
        convert(canonical, tmp_path / 'orbax')
    with pytest.raises(InputError, match='or lies in'):
        convert(canonical, canonical / 'out')
    with pytest.raises(InputError, match=r"unknown dtype 'float61' .*'float16'.*: keep"):
        convert(canonical, tmp_path / 'out', 'float61')
    shutil.rmtree(tmp_path / 'orbax/unet/params/d', ignore_errors=True)
    for file in (tmp_path / 'orbax/unet/params').glob('*'):
        if file.is_file():
            file.write_bytes(b'')
    with pytest.raises(InputError, match=r'unet/params is not a readable orbax checkpoint') as e:
        convert(tmp_path / 'orbax', tmp_path / 'out')
    assert '\n' not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ['orbax']


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_lora_between_dialects(random_folder, tmp_path, dtype):
    params = open_model(random_folder).shapes('unet')
    kohya = write_random_lora(
        params,
        tmp_path / 'kohya.safetensors',
        alpha=2.0,
        dtype=dtype,
        metadata={'lcm_jax.accelerates': 'true'},
    )
    said = convert_lora(kohya, tmp_path / 'peft.safetensors', random_folder, 'peft')
    assert said.endswith('79 modules in the peft dialect'), said
    convert_lora(tmp_path / 'peft.safetensors', tmp_path / 'back.safetensors', random_folder)
    first, _ = read_lora(kohya, params)
    for name in ('peft', 'back'):
        lora, metadata = read_lora(tmp_path / f'{name}.safetensors', params)
        assert metadata['lcm_jax.accelerates'] == 'true'
        for path, ab in first.items():
            for leaf, x in ab.items():
                np.testing.assert_array_equal(lora[path][leaf], x)


def test_inspect(lora_file, random_folder, tmp_path):
    text = inspect_lora(lora_file)
    for line in (
        'dialect     kohya',
        'modules     79 (incomplete: 0)',
        'rank        4',
        'alpha       4',
        'dtype       float32',
        '  ss_network_dim: 4',
    ):
        assert line in text.splitlines(), (line, text)
    convert_lora(lora_file, tmp_path / 'peft.safetensors', random_folder, 'peft')
    text = inspect_lora(tmp_path / 'peft.safetensors')
    assert 'dialect     peft' in text and 'alpha       not among the tensors' in text


def test_bad_lora_files(lora_file, random_folder, tmp_path):
    with pytest.raises(InputError, match='no such file'):
        inspect_lora(tmp_path / 'nope.safetensors')
    with pytest.raises(InputError, match=r'no LoRA factors in a known dialect \(kohya, peft\)'):
        inspect_lora(random_folder / UNET)
    out = tmp_path / 'out.safetensors'
    for arguments, said in (
        ((lora_file, tmp_path / 'out.bin', random_folder), 'the name must end in .safetensors'),
        ((lora_file, out, random_folder, 'khoya'), "unknown LoRA dialect 'khoya' .*'kohya'"),
        ((lora_file, out, tmp_path), 'neither a shipped model'),
        ((random_folder / UNET, out, random_folder), 'belong to no module'),
    ):
        with pytest.raises(InputError, match=said):
            convert_lora(*arguments)
    assert not [*tmp_path.iterdir()]
