"""Models from form to form: to the last bit, every file, all or nothing."""

import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lcm_jax import weights
from lcm_jax.convert import convert
from lcm_jax.errors import InputError
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
