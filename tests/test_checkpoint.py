"""Opening models in every form: the same configs and the same bits, or one error that says what is wrong."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lcm_jax import single, tensors, weights
from lcm_jax.checkpoint import needed, open_model, weights_file
from lcm_jax.convert import convert
from lcm_jax.errors import InputError
from lcm_jax.model import describe
from lcm_jax.models import zoo
from lcm_jax.models.shapes import unet_shapes
from lcm_jax.tensors import read_tensors, write_tensors
from lcm_jax.tree import named

UNET = 'unet/diffusion_pytorch_model.safetensors'
TEXT = 'text_encoder/model.safetensors'


def same(ckpt, expected):
    """A Checkpoint holds exactly these tensors, to the last bit."""
    assert ckpt.configs.keys() == expected.keys()
    for part, want in expected.items():
        found = {key: np.asarray(x) for key, x in ckpt.tensors(part).items()}
        assert found.keys() == want.keys()
        for key, x in want.items():
            assert found[key].dtype == x.dtype and found[key].tobytes() == x.tobytes(), key


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the SD 1 folder to change."""
    return shutil.copytree(tiny_folder('sd1')[0], tmp_path / 'model')


@pytest.fixture(scope='session')
def expected(tiny_folder):
    return tiny_folder('sd1')[1]


def shard(file, index, ends=('00001-of-00002', '00002-of-00002')):
    """A weights file in two, with their index, as diffusers and transformers write them."""
    found = load_file(file)
    stem = index.partition('.')[0] + ('.fp16' if 'fp16' in index else '')
    where = {key: f'{stem}-{ends[i % 2]}.safetensors' for i, key in enumerate(found)}
    for name in set(where.values()):
        save_file({k: x for k, x in found.items() if where[k] == name}, file.with_name(name))
    file.with_name(index).write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    file.unlink()


def variant(file):
    file.rename(file.with_name(file.name.replace('.safetensors', '.fp16.safetensors')))


def pickled(name):
    def damage(file):
        torch.save(load_file(file), file.with_name(name))
        file.unlink()

    return damage


def old_attention(file):
    """AutoencoderKL files before diffusers 0.15, some with attention as 1x1 convolutions."""
    names = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}
    found = load_file(file)
    for new, old in names.items():
        found = {key.replace(f'.{new}.', f'.{old}.'): x for key, x in found.items()}
    old = 'mid_block.attentions.0.query.weight'
    save_file({k: x[..., None, None] if k.endswith(old) else x for k, x in found.items()}, file)


def buffers(file):
    found = {k.removeprefix('text_model.'): x for k, x in load_file(file).items()}
    save_file(found | {'embeddings.position_ids': torch.arange(77)[None]}, file)


ON_DISK = {
    'sharded': (UNET, lambda f: shard(f, 'diffusion_pytorch_model.safetensors.index.json')),
    'sharded text': (TEXT, lambda f: shard(f, 'model.safetensors.index.json')),
    'fp16': (UNET, variant),
    'fp16 text': (TEXT, variant),
    'fp16 sharded': (
        UNET,
        lambda f: shard(f, 'diffusion_pytorch_model.safetensors.index.fp16.json'),
    ),
    'bin': (UNET, pickled('diffusion_pytorch_model.bin')),
    'bin text': (TEXT, pickled('pytorch_model.bin')),
    'old attention': (UNET.replace('unet', 'vae'), old_attention),
    'position_ids, no prefix': (TEXT, buffers),
}


@pytest.mark.parametrize('form', ON_DISK)
def test_diffusers_folders(form, folder, expected):
    file, change = ON_DISK[form]
    change(folder / file)
    same(open_model(folder), expected)


def test_the_plain_file_is_preferred():
    stem = 'diffusion_pytorch_model'
    plain, half = f'{stem}.safetensors', f'{stem}.fp16.safetensors'
    shards = [f'{stem}-0000{i}-of-00002.safetensors' for i in (1, 2)]
    assert weights_file([half, plain, f'{stem}.bin', f'{stem}.non_ema.safetensors']) == plain
    assert weights_file([half, f'{stem}.bin']) == half
    assert weights_file([*shards, f'{stem}.safetensors.index.json', half]) == (
        f'{stem}.safetensors.index.json'
    )
    assert weights_file([f'{stem}.bin', 'config.json']) == f'{stem}.bin'
    assert weights_file(['pytorch_model.bin', 'model.safetensors']) == 'model.safetensors'
    assert weights_file(['config.json', *shards]) is None
    with pytest.raises(InputError, match=r'choose one of .*bf16.*fp16'):
        weights_file([half, f'{stem}.bf16.safetensors'])


@pytest.fixture(scope='session')
def single_file(tiny_folder, tmp_path_factory):
    """single_file(family) -> one file in original names, without our metadata."""
    root = tmp_path_factory.mktemp('single')

    def make(name):
        file = root / f'{name}.safetensors'
        if not file.is_file():
            convert(tiny_folder(name)[0], root / 'with.safetensors')
            found, metadata = read_tensors(root / 'with.safetensors')
            assert single.MODEL in metadata
            save_file({k: torch.tensor(x) for k, x in found.items()}, file)
            (root / 'with.safetensors').unlink()
        return file

    return make


@pytest.mark.parametrize('family', tiny.MODELS)
def test_single_files_say_what_their_folders_say(family, tiny_folder, single_file):
    folder, expected = tiny_folder(family)
    theirs, ours = open_model(folder), open_model(single_file(family))
    same(ours, expected)
    assert all(ours.spec(part) == theirs.spec(part) for part in expected)
    assert (ours.index, ours.scheduler) == (theirs.index, theirs.scheduler)
    for name in [k for k in ours.index if k.startswith('tokenizer')]:
        prompts = ['a photo of a cat']
        np.testing.assert_array_equal(
            ours.tokenizer(name)(prompts), theirs.tokenizer(name)(prompts)
        )


def test_ckpt(single_file, expected, tmp_path):
    """A Lightning checkpoint: weights under state_dict, beside what training left."""
    found = load_file(single_file('sd1'))
    found |= {'betas': torch.full((3,), torch.inf), 'model_ema.decay': torch.ones(())}
    torch.save({'state_dict': found, 'global_step': 3}, tmp_path / 'model.ckpt')
    same(open_model(tmp_path / 'model.ckpt'), expected)
    (tmp_path / 'model.ckpt').write_bytes(b'<!DOCTYPE html>')
    with pytest.raises(InputError, match=r'model\.ckpt is not a PyTorch file of weights: '):
        open_model(tmp_path / 'model.ckpt')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_ckpt_of_a_whole_run(single_file, expected, tmp_path, monkeypatch, zipped):
    """It is not unpickled; what the message says to do makes a file that opens."""
    found = load_file(single_file('sd1'))
    torch.save(
        {'state_dict': found, 'callbacks': {Path: Path()}},
        tmp_path / 'model.ckpt',
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match=r'model\.ckpt holds more than weights \(pathlib\.') as e:
        open_model(tmp_path / 'model.ckpt')
    said = str(e.value)
    assert '\n' not in said and 'may run any code' in said
    monkeypatch.chdir(tmp_path)
    exec(said.split('`')[1])
    same(open_model(tmp_path / 'weights.ckpt'), expected)


def test_ckpt_without_torch(tmp_path, monkeypatch):
    (tmp_path / 'model.ckpt').write_bytes(b'x')
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)
    with pytest.raises(
        InputError, match=r'only PyTorch can read safely.*save_file.*`lcm-jax convert`'
    ):
        open_model(tmp_path / 'model.ckpt')


WHOLE_TOWER = {  # what the published SD 2 files hold beside the 23 layers that are used
    f'cond_stage_model.model.{key}': np.ones(3, np.float16)
    for key in (
        'text_projection',
        'logit_scale',
        'attn_mask',
        *(f'transformer.resblocks.3.{x}' for x in ('ln_1.weight', 'mlp.c_fc.bias')),
    )
}


def test_sd2_files_with_the_whole_text_encoder(single_file, tiny_folder, tmp_path):
    found, _ = read_tensors(single_file('sd2'))
    write_tensors(tmp_path / 'x.safetensors', found | WHOLE_TOWER)
    ckpt = open_model(tmp_path / 'x.safetensors')
    assert ckpt.spec('text_encoder').layers == 3
    same(ckpt, tiny_folder('sd2')[1])
    more = {'cond_stage_model.model.transformer.resblocks.9.ln_1.weight': np.ones(3, np.float16)}
    write_tensors(tmp_path / 'x.safetensors', found | more)
    with pytest.raises(InputError, match=r'1 unexpected: .*resblocks\.9'):
        open_model(tmp_path / 'x.safetensors').tensors('text_encoder')


def test_sd2_files_in_sgm_names(single_file, tiny_folder, tmp_path):
    """As SD-Turbo's; SDXL's refiner has its text encoder in the same place."""
    found, _ = read_tensors(single_file('sd2'))
    renamed = {
        key.replace('cond_stage_model.model.', 'conditioner.embedders.0.model.'): x
        for key, x in found.items()
    }
    assert renamed.keys() != found.keys()
    write_tensors(tmp_path / 'x.safetensors', renamed)
    same(open_model(tmp_path / 'x.safetensors'), tiny_folder('sd2')[1])
    added = {'model.diffusion_model.label_emb.0.0.weight': np.zeros((4, 4), np.float16)}
    write_tensors(tmp_path / 'x.safetensors', renamed | added)
    with pytest.raises(InputError, match=r'x\.safetensors is a refiner of Stable Diffusion XL'):
        open_model(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('prefix', ['', 'first_stage_model.'])
def test_a_file_of_a_vae_alone(single_file, tiny_folder, tmp_path, prefix):
    """As they are shared: without a prefix. It takes the model's scaling factor, which it does not tell."""
    own, file = 'first_stage_model.', tmp_path / 'vae.safetensors'
    found, _ = read_tensors(single_file('sdxl'))
    vae = {prefix + k.removeprefix(own): x for k, x in found.items() if k.startswith(own)}
    leftovers = {f'{prefix}loss.logvar': np.zeros(()), f'{prefix}model_ema.decay': np.zeros(())}
    write_tensors(file, vae | leftovers)
    folder, expected = tiny_folder('sdxl')
    same(open_model(file), {'vae': expected['vae']})
    write_tensors(tmp_path / 'x.safetensors', {k: found[k] for k in found if own not in k})
    for base, scaling in (
        (folder, 0.13025),
        (tmp_path / 'x.safetensors', 0.13025),  # which has no VAE
        (tiny_folder('sd1')[0], 0.18215),
    ):
        assert describe(base, vae=file).specs['vae'].scaling_factor == scaling


def test_prediction_type(single_file, tmp_path):
    def kind(extra=None, metadata=None, name='sdxl', **options):
        found, _ = read_tensors(single_file(name))
        write_tensors(tmp_path / 'x.safetensors', found | (extra or {}), metadata)
        return open_model(tmp_path / 'x.safetensors', **options).scheduler

    zero = np.zeros(0, np.float16)
    assert kind()['prediction_type'] == 'epsilon'
    assert kind({'v_pred': zero})['prediction_type'] == 'v_prediction'
    assert kind({'v_pred': zero})['timestep_spacing'] == 'leading'
    stale = kind({'v_pred': zero}, {'modelspec.prediction_type': 'epsilon'})
    assert stale['prediction_type'] == 'v_prediction'
    zero_snr = kind({'v_pred': zero, 'ztsnr': zero})
    assert zero_snr['rescale_betas_zero_snr'] is True
    assert zero_snr['timestep_spacing'] == 'trailing'  # arXiv 2305.08891, section 3.4
    assert kind(metadata={'modelspec.prediction_type': 'v'})['prediction_type'] == 'v_prediction'
    assert kind(prediction_type='v_prediction')['prediction_type'] == 'v_prediction'
    with pytest.raises(InputError, match="unknown prediction_type 'v'"):
        kind(prediction_type='v')


@pytest.mark.parametrize(
    ('name', 'metadata', 'options', 'px'),
    [
        ('sd2', {}, {}, 512),
        ('sd2', {'modelspec.prediction_type': 'v'}, {}, 768),
        ('sd2', {}, {'prediction_type': 'v_prediction'}, 768),
        ('sd2', {'modelspec.prediction_type': 'v'}, {'prediction_type': 'epsilon'}, 512),
        ('sd1', {}, {'prediction_type': 'v_prediction'}, 512),
        ('sdxl', {'modelspec.prediction_type': 'v'}, {}, 1024),
    ],
)
def test_the_size_of_pictures_of_a_single_file(single_file, tmp_path, name, metadata, options, px):
    write_tensors(tmp_path / 'x.safetensors', read_tensors(single_file(name))[0], metadata)
    found = open_model(tmp_path / 'x.safetensors', **options).configs
    assert (found['unet']['sample_size'], found['vae']['sample_size']) == (px // 8, px)


def test_sd2_of_either_kind_is_told_by_a_norm():
    """By the UNet alone: a file may lack its text encoder."""
    unet = weights.keys(unet_shapes(zoo.MODELS['sd21'].unet))
    unet = single.original_shapes(single.UNET, unet)
    prefix, last = 'model.diffusion_model.', 'model.diffusion_model.output_blocks.11.1.'
    cases = (
        (0.05, {}, 'epsilon', 64),
        (0.2, {}, 'v_prediction', 96),
        (0.2, {f'{prefix}input_blocks.0.0.weight': (320, 9, 3, 3)}, 'epsilon', 64),  # inpainting
        (0.2, {f'{last}proj_in.weight': (320, 320, 1, 1)}, 'epsilon', 64),  # as SD 1's
    )
    for scale, shapes, kind, side in cases:
        found = {
            k: tensors.Tensor(k, s, np.dtype(np.float16), None) for k, s in (unet | shapes).items()
        }
        bias = np.float16(scale) * np.tile(np.float16([1, -1]), 160)
        found[f'{last}transformer_blocks.0.norm1.bias'] = tensors.lazy(bias)
        *_, model = single.describe(found, {}, 'x.safetensors')
        assert model['scheduler']['prediction_type'] == kind
        assert model['configs']['unet']['sample_size'] == side


# --- placement


def test_tensors_go_to_the_devices_they_are_told(folder, expected):
    ckpt, mesh = open_model(folder), jax.make_mesh((1,), ('x',))
    spread = jax.NamedSharding(mesh, jax.P())
    plain = ckpt.load('vae', jnp.bfloat16)
    one = ckpt.load('vae', jnp.bfloat16, spread)
    tree = ckpt.load('vae', jnp.bfloat16, jax.tree.map(lambda _: spread, plain))
    want = weights.load(ckpt.shapes('vae', jnp.bfloat16), expected['vae'])
    for got in (plain, one, tree):
        for (path, a), (_, b) in zip(named(got), named(want), strict=True):
            assert isinstance(a, jax.Array) and a.dtype == jnp.bfloat16
            assert np.asarray(a).tobytes() == np.ascontiguousarray(b).tobytes(), path
    assert {x.sharding for got in (one, tree) for x in jax.tree.leaves(got)} == {spread}


def test_only_headers_are_read_on_opening(folder, monkeypatch):
    def read(*_, **__):
        raise AssertionError('a tensor was read')

    monkeypatch.setattr(np, 'memmap', read)
    ckpt = open_model(folder)
    found = ckpt.tensors('unet')
    assert found['conv_in.weight'].shape == (64, 4, 3, 3)
    with pytest.raises(AssertionError):
        np.asarray(found['conv_in.weight'])


# --- tensors on disk


@pytest.mark.parametrize('dtype', [d for d in tensors.DTYPES.values() if d.kind != 'b'])
def test_finite(dtype):
    x = (np.arange(-60, 68) / 4).astype(dtype)
    assert tensors.finite(x) and tensors.finite(x[:0]) and tensors.finite(x[0])
    if jnp.issubdtype(dtype, jnp.floating):
        top = jnp.finfo(dtype)
        assert tensors.finite(np.asarray([top.max, top.min, -0.0]).astype(dtype))
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            y = x.copy()
            y[3] = bad
            assert tensors.finite(y) == bool(np.isfinite(y.astype(float)).all())


def test_written_files_are_those_of_safetensors(tmp_path):
    rng = np.random.default_rng(0)
    found = {
        f'{name}{i}': torch.tensor(rng.normal(size=(i, 3, 2)) * 9).to(getattr(torch, name))
        for name in ('float32', 'float16', 'bfloat16', 'int64', 'int32', 'uint8', 'bool')
        for i in (0, 1, 2)
    } | {'é"\n': torch.tensor(1.5), 'f8': torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)}
    save_file(found, tmp_path / 'theirs', metadata={'format': 'pt'})
    lazily, _ = tensors.open_tensors(tmp_path / 'theirs')
    write_tensors(tmp_path / 'ours', lazily)
    assert (tmp_path / 'ours').read_bytes() == (tmp_path / 'theirs').read_bytes()
    back = load_file(tmp_path / 'ours')
    assert all(x.dtype == back[k].dtype and x.shape == back[k].shape for k, x in found.items())


def test_a_failed_write_leaves_nothing(tmp_path):
    def read():
        raise InputError('cannot be read')

    bad = tensors.Tensor('x', (2,), np.dtype(np.float32), read)
    with pytest.raises(InputError, match='cannot be read'):
        write_tensors(tmp_path / 'x', {'a': np.ones(3, np.float32), 'b': bad})
    assert not [*tmp_path.iterdir()]


def test_values_that_a_dtype_cannot_hold(folder):
    found, _ = read_tensors(folder / UNET)
    found = {k: x.astype(np.float32) for k, x in found.items()}
    found['conv_in.bias'][1] = 1e6
    write_tensors(folder / UNET, found)
    open_model(folder).load('unet', jnp.bfloat16)
    with pytest.raises(InputError, match=r'conv_in\.bias holds values that float16 cannot'):
        open_model(folder).load('unet', jnp.float16)


# --- bad input: one line that names it, and nothing half-loaded


def edit(change):
    def damage(file):
        found, metadata = read_tensors(file)
        change(found)
        write_tensors(file, found, metadata)

    return damage


def set_nan(found):
    found['conv_in.bias'][0] = np.nan


def index_of(change):
    def damage(file):
        shard(file, 'diffusion_pytorch_model.safetensors.index.json')
        change(file.parent)

    return damage


def absent_key(folder):
    file = folder / 'diffusion_pytorch_model.safetensors.index.json'
    index = json.loads(file.read_text())
    index['weight_map']['conv_inn.bias'] = index['weight_map']['conv_in.bias']
    file.write_text(json.dumps(index))


BAD = {
    'truncated': (lambda f: f.write_bytes(f.read_bytes()[:-9]), 'is not a readable safetensors'),
    'no magic': (lambda f: f.write_bytes(b'<!DOCTYPE html>'), 'is not a readable safetensors'),
    'a pointer': (
        lambda f: f.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0'),
        f'{UNET} is a pointer of Git LFS, not the file: fetch it, `git lfs pull`',
    ),
    'missing': (edit(lambda x: x.pop('conv_in.bias')), '1 missing: conv_in.bias'),
    'unexpected': (
        edit(lambda x: x.update({'conv_inn.bias': x['conv_in.bias']})),
        r"1 unexpected: conv_inn.bias \(did you mean 'conv_in.bias'\?\)",
    ),
    'misshapen': (
        edit(lambda x: x.update({'conv_in.bias': x['conv_in.bias'][:3]})),
        r'1 misshapen: conv_in.bias \(3,\) instead of \(64,\)',
    ),
    'NaN': (edit(set_nan), 'conv_in.bias holds values that are not finite'),
    'no file': (lambda f: f.unlink(), f'no such file: .*{UNET}'),
    'no shard': (
        index_of(lambda f: next(f.glob('*00002-of*')).unlink()),
        'no such file: .*00002-of-00002',
    ),
    'absent key': (
        index_of(absent_key),
        r"names 1 tensors that its shards do not hold: conv_inn.bias \(did you mean 'conv_in.bias'",
    ),
    'bad index': (
        index_of(lambda f: next(f.glob('*.index.json')).write_text('{}')),
        r'index\.json has no weight_map',
    ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_folders(case, folder):
    damage, said = BAD[case]
    damage(folder / UNET)
    with pytest.raises(InputError, match=said) as e:
        open_model(folder).load('unet')
    assert '\n' not in str(e.value)


def test_sizes_that_cannot_be(folder):
    config = json.loads((folder / 'unet/config.json').read_text())
    (folder / 'unet/config.json').write_text(json.dumps(config | {'norm_num_groups': 7}))
    with pytest.raises(InputError, match='no unet has these sizes: UNetSpec'):
        open_model(folder).load('unet')


BAD_SINGLE = {
    'other model': (lambda x: x.clear() or x.update(a=np.ones(1)), 'no key of the original'),
    'no UNet inside': (
        lambda x: [x.pop(k) for k in [*x] if 'output_blocks' in k or 'attn2' in k],
        'is no UNet of Stable Diffusion',
    ),
    'missing': (
        lambda x: x.pop('first_stage_model.encoder.mid.attn_1.q.weight'),
        '1 missing: first_stage_model.encoder.mid.attn_1.q.weight',
    ),
    'unexpected': (
        lambda x: x.update({'model.diffusion_model.out.5.weight': np.ones(3)}),
        r"1 unexpected: model.diffusion_model.out.5.weight \(did you mean 'model",
    ),
    'misshapen': (
        lambda x: x.update({'first_stage_model.quant_conv.bias': np.ones(3)}),
        r'1 misshapen: first_stage_model.quant_conv.bias \(3,\) instead of \(8,\)',
    ),
    'a scalar': (
        lambda x: x.update({'model.diffusion_model.out.2.weight': np.ones(())}),
        r'model.diffusion_model.out.2.weight has the shape \(\)',
    ),
}


@pytest.mark.parametrize('case', BAD_SINGLE)
def test_bad_single_files(case, single_file, tmp_path):
    damage, said = BAD_SINGLE[case]
    found, _ = read_tensors(single_file('sd1'))
    damage(found)
    write_tensors(tmp_path / 'x.safetensors', found)
    with pytest.raises(InputError, match=said) as e:
        open_model(tmp_path / 'x.safetensors').tensors('vae')
    assert '\n' not in str(e.value) and 'x.safetensors' in str(e.value)


# --- hub


def cached(folder, cache, name='models--someone--tiny', commit='a' * 40):
    """A folder as the hub's client keeps it: blobs, a snapshot of links, a ref."""
    root = cache / name
    for i, file in enumerate(p for p in folder.rglob('*') if p.is_file()):
        blob, link = root / 'blobs' / str(i), root / 'snapshots' / commit / file.relative_to(folder)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (root / 'refs').mkdir()
    (root / 'refs/main').write_text(commit)


def test_hub_ids_from_the_cache(folder, expected, hub):
    cached(folder, hub)
    ckpt = open_model('someone/tiny')
    same(ckpt, expected)
    assert ckpt.tokenizer()(['a cat']).shape == (1, 77)
    same(open_model('someone/tiny@' + 'a' * 40), expected)
    for name in ('someone/other', 'someone/tiny@other'):
        with pytest.raises(InputError, match=f"'{name}' is no folder .* the hub does not give it"):
            open_model(name)


def test_variants_to_choose_from_on_the_hub_are_refused_before_the_download(hub, monkeypatch):
    def snapshot_download(*_, **__):
        raise AssertionError('downloaded')

    stem = 'diffusion_pytorch_model'
    files = [f'unet/{stem}.{x}.safetensors' for x in ('ema', 'fp16')]
    monkeypatch.setattr('huggingface_hub.list_repo_files', lambda repo, **_: files)
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    with pytest.raises(InputError) as e:
        open_model('someone/tiny')
    assert str(e.value) == (
        f'someone/tiny/unet: choose one of {stem}.ema.safetensors, {stem}.fp16.safetensors '
        f'and name it {stem}.safetensors'
    )


def test_hub_downloads_only_what_a_model_needs(hub, monkeypatch, folder):
    """The plain safetensors of each component, its shards, configs and tokenizers; nothing else."""
    asked = {}
    files = [
        'model_index.json',
        'v1-5-pruned.ckpt',
        'safety_checker/model.safetensors',
        'scheduler/scheduler_config.json',
        'text_encoder/config.json',
        'text_encoder/model.fp16.safetensors',
        'text_encoder/model.safetensors',
        'tokenizer/vocab.json',
        'unet/config.json',
        'unet/diffusion_pytorch_model-00001-of-00002.safetensors',
        'unet/diffusion_pytorch_model-00002-of-00002.safetensors',
        'unet/diffusion_pytorch_model.bin',
        'unet/diffusion_pytorch_model.safetensors.index.json',
        'vae/config.json',
        'vae/diffusion_pytorch_model.bin',
    ]
    monkeypatch.setattr('huggingface_hub.list_repo_files', lambda repo, **_: files)
    monkeypatch.setattr(
        'huggingface_hub.snapshot_download', lambda repo, **options: asked.update(options) or folder
    )
    assert open_model('someone/tiny@v1').folder == folder
    assert asked['revision'] == 'v1'
    assert sorted(asked['allow_patterns']) == sorted(
        [
            'model_index.json',
            'scheduler/scheduler_config.json',
            'text_encoder/config.json',
            'text_encoder/model.safetensors',
            'tokenizer/vocab.json',
            'unet/config.json',
            'unet/diffusion_pytorch_model-00001-of-00002.safetensors',
            'unet/diffusion_pytorch_model-00002-of-00002.safetensors',
            'unet/diffusion_pytorch_model.safetensors.index.json',
            'vae/config.json',
            'vae/diffusion_pytorch_model.bin',
        ]
    )
    assert not set(needed([])) - {'model_index.json', 'scheduler/scheduler_config.json'}


def test_shards_of_one_variant_are_downloaded():
    stem, ends = 'unet/diffusion_pytorch_model', ('00001-of-00002', '00002-of-00002')
    plain = {f'{stem}-{n}.safetensors' for n in ends} | {f'{stem}.safetensors.index.json'}
    half = {f'{stem}.fp16-{n}.safetensors' for n in ends}
    older = {f'{stem}-{n}.fp16.safetensors' for n in ends}
    indexes = {f'{stem}.safetensors.index.fp16.json'}
    pickles = {f'{stem}-{n}.bin' for n in ends} | {f'{stem}.bin.index.json'}

    def fetched(*names):
        return {n for n in needed(set().union(*names)) if n.startswith('unet/diffusion')}

    assert fetched(plain, half, older, indexes, pickles) == plain
    assert fetched(half, indexes, pickles) == half | indexes
    assert fetched(older, indexes) == older | indexes
    assert fetched(pickles) == pickles
