"""LoRA files to LoRA files: convert, inspect, check, merge, extract."""

import shutil

import jax
import jax.numpy as jnp
import lora_dialects
import numpy as np
import pytest
from conftest import random_lora, write_random_lora
from test_lora import relative

from lcm_jax import adapters, lora
from lcm_jax.checkpoint import open_model
from lcm_jax.errors import InputError
from lcm_jax.lora_files import algebra, describe, verbs
from lcm_jax.lora_files.files import read_lora, write_lora
from lcm_jax.pipeline import Pipeline
from lcm_jax.tensors import open_tensors, read_tensors, write_tensors
from lcm_jax.tree import named

WEIGHTS = {
    'unet': 'unet/diffusion_pytorch_model.safetensors',
    'text_encoder': 'text_encoder/model.safetensors',
}


@pytest.fixture(scope='module')
def models(random_folder):
    return verbs.models_of(random_folder)


def foreign(models, dialect, file, rank=3, seed=0):
    """A LoRA file of another program for all components."""
    tensors = lora_dialects.DIALECTS[dialect](lora_dialects.peft(models, rank=rank, seed=seed))
    write_tensors(file, tensors)
    return file


def deltas(file, models):
    adapters, _ = read_lora(file, models)
    return {(c, p): lora.delta(ab) for c, adapter in adapters.items() for p, ab in adapter.items()}


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_convert_there_and_back(random_folder, models, tmp_path, dtype):
    options = {'alpha': 2.0, 'dtype': dtype, 'metadata': {'lcm_jax.accelerates': 'true'}}
    kohya = write_random_lora(models['unet'], tmp_path / 'first.safetensors', **options)
    names = 'peft', 'kohya-sgm', 'kohya'
    for before, after in zip(('first', *names), names, strict=False):
        files = (tmp_path / f'{name}.safetensors' for name in (before, after))
        said = verbs.convert_lora(*files, random_folder, after)
        assert said.endswith('79 modules of unet'), said
    first, _ = read_lora(kohya, models)
    for name in names:
        back, metadata = read_lora(tmp_path / f'{name}.safetensors', models)
        assert metadata['lcm_jax.accelerates'] == 'true'
        jax.tree.map(np.testing.assert_array_equal, back, first)
    assert 'alpha       2' in describe.inspect_lora(tmp_path / 'peft.safetensors')


@pytest.mark.parametrize('dialect', lora_dialects.DIALECTS)
def test_convert_from_every_dialect(random_folder, models, tmp_path, dialect):
    file = foreign(models, dialect, tmp_path / 'theirs.safetensors')
    verbs.convert_lora(file, tmp_path / 'ours.safetensors', random_folder)
    want, got = (deltas(tmp_path / f'{name}.safetensors', models) for name in ('theirs', 'ours'))
    assert got.keys() == want.keys() and relative(got, want) < 1e-6


STEM = 'lora_unet_mid_block_resnets_0_conv1'


@pytest.fixture
def whole_lokr(tmp_path):
    """A LoKr of two whole matrices, so of full rank, with an alpha that means nothing."""
    rng = np.random.default_rng(0)
    whole = {f'lokr_w{i}': rng.normal(size=n) for i, n in ((1, (4, 8)), (2, (8, 4, 3, 3)))}
    tensors = {f'{STEM}.{k}': np.asarray(x, np.float32) for k, x in whole.items()}
    write_tensors(
        tmp_path / 'lokr.safetensors', tensors | {f'{STEM}.alpha': np.asarray(1e5, np.float32)}
    )
    return tmp_path / 'lokr.safetensors'


def test_an_alpha_that_means_nothing_is_not_that_of_the_new_file(
    random_folder, whole_lokr, tmp_path
):
    verbs.convert_lora(whole_lokr, tmp_path / 'g.safetensors', random_folder)
    assert read_tensors(tmp_path / 'g.safetensors')[0][f'{STEM}.alpha'] == 32  # the rank


def test_an_update_that_is_larger_as_factors_is_held_as_one(random_folder, whole_lokr, lora_file):
    params = {'unet': open_model(random_folder).load('unet', jnp.bfloat16)}
    adapter = adapters.read_adapter(whole_lokr, 'lokr', 1.0, params)
    ((path, held),) = adapter.loras['unet'].items()
    w = dict(named(params['unet']))[path]
    assert sum(x.nbytes for x in held.values()) == w.nbytes
    got = dict(named(adapters.merge(params, [adapter])['unet']))[path]
    update = lora.delta(read_lora(whole_lokr, params)[0]['unet'][path])
    assert relative(got.astype(np.float32), w.astype(np.float32) + update) < 1e-2
    small = adapters.read_adapter(lora_file, 'style', 1.0, params).loras['unet']
    assert all(ab.keys() == {'down', 'up'} for ab in small.values())


@pytest.mark.parametrize('dialect', [d for d in lora_dialects.DIALECTS if d != 'mixed'])
def test_inspect_without_the_model(models, tmp_path, dialect):
    file = foreign(models, dialect, tmp_path / 'f.safetensors')
    lines = describe.inspect_lora(file).splitlines()
    kohya = dialect.startswith('kohya')
    # Old files have no name of their own but for attention.
    said = 'diffusers, diffusers-old' if dialect == 'diffusers-old' else dialect
    assert {f'dialect     {said}', 'modules     79 unet, 12 text_encoder'} <= {*lines}
    assert {'method      LoRA', 'rank        3', 'dtype       float32'} <= {*lines}
    assert f'alpha       {"3" if kohya else "not in the file; taken as the rank"}' in lines
    norms = {
        line[:-10].strip(): float(line[-10:])
        for line in lines[lines.index('norm of the update') + 1 :]
    }
    want = deltas(file, models)
    total = np.sqrt(sum(np.linalg.norm(x) ** 2 for x in want.values()))
    assert np.isclose(np.linalg.norm([*norms.values()]), total, rtol=1e-3)
    layer = [x for (_, path), x in want.items() if 'layers.1' in path]
    name = next(name for name in norms if name.endswith('layers.1'))
    assert np.isclose(norms[name], np.sqrt(sum(np.linalg.norm(x) ** 2 for x in layer)), rtol=1e-3)


def test_check(random_folder, models, tmp_path):
    file = foreign(models, 'kohya', tmp_path / 'f')
    assert verbs.check_lora(file, random_folder, 'comfyui') == (
        f'comfyui loads 91 of 91 modules of {file}',
        0,
    )
    text, dropped = verbs.check_lora(
        foreign(models, 'peft', tmp_path / 'g'), random_folder, 'a1111'
    )
    assert (
        dropped == 91
        and f'a1111 loads 0 of 91 modules of {tmp_path}/g; it drops text_encoder ' in text
    )
    with pytest.raises(InputError, match=r"unknown program 'comfy' .*'comfyui'"):
        verbs.check_lora(file, random_folder, 'comfy')
    wide = {
        key: np.repeat(x, 2, 0) if 'down' in key else x for key, x in read_tensors(file)[0].items()
    }
    write_tensors(tmp_path / 'wide', wide)  # names that fit, shapes that do not
    with pytest.raises(InputError, match=r'modules .*nothing was loaded'):
        verbs.check_lora(tmp_path / 'wide', random_folder, 'comfyui')


def test_a_sum_with_an_acceleration_lora_is_one(random_folder, models, tmp_path):
    style, fast = (foreign(models, 'peft', tmp_path / name, 1) for name in ('style', 'my-lcm'))
    for scale, marked in ((1.0, 'true'), (0.0, None)):
        out = tmp_path / f'sum{scale}.safetensors'
        verbs.merge_loras([(style, 1.0), (fast, scale)], out, random_folder)
        assert open_tensors(out)[1].get('lcm_jax.accelerates') == marked


def test_a_converted_file_accelerates_as_it_did(random_folder, lora_file, tmp_path):
    """What only the name of the file or of its folder said is in the new one's metadata."""
    usual = tmp_path / 'lcm-lora-tiny' / 'pytorch_lora_weights.safetensors'
    usual.parent.mkdir()
    for file, marked in ((shutil.copy(lora_file, usual), 'true'), (lora_file, None)):
        out = tmp_path / f'{marked}.safetensors'
        verbs.convert_lora(file, out, random_folder)
        assert open_tensors(out)[1].get('lcm_jax.accelerates') == marked


def test_small_updates_are_kept(tmp_path):
    """Of alpha 1 and rank 128, as kohya's trainer has it: what is stored would be subnormal."""
    models, rng = verbs.models_of('emoji'), np.random.default_rng(0)
    kernels = {p: w for p, w in named(models['unet']) if p.endswith('attn1/to_q/kernel')}
    adapter = {
        path: {
            'down': rng.normal(size=(w.shape[0], 128)).astype(np.float32) / 11,
            'up': rng.normal(size=(128, w.shape[1])).astype(np.float32) * 2e-6,
        }
        for path, w in kernels.items()
    }
    write_lora(tmp_path / 'a.safetensors', {'unet': adapter}, models, alpha=1.0)
    verbs.merge_loras([(tmp_path / 'a.safetensors', 0.1)], tmp_path / 'b.safetensors')
    a, b = (deltas(tmp_path / f'{name}.safetensors', models) for name in 'ab')
    assert relative(b, {key: 0.1 * x for key, x in a.items()}) < 1e-3
    mixed, metadata = read_tensors(tmp_path / 'a.safetensors')
    mixed[min(key for key in mixed if key.endswith('.alpha'))] *= 4  # the new file's are its rank
    write_tensors(tmp_path / 'c.safetensors', mixed, metadata)
    verbs.convert_lora(tmp_path / 'c.safetensors', tmp_path / 'd.safetensors')
    c, d = (deltas(tmp_path / f'{name}.safetensors', models) for name in 'cd')
    assert relative(d, c) < 1e-3


def test_merge_is_the_exact_sum(random_folder, models, tmp_path):
    files = [
        foreign(models, d, tmp_path / d, rank, seed=rank)
        for d, rank in (('kohya', 3), ('diffusers-old', 2), ('peft', 1))
    ]
    terms = list(zip(files, (1.0, 0.8, -0.5), strict=True))
    out = tmp_path / 'sum.safetensors'
    said = verbs.merge_loras(terms, out, random_folder)
    assert said.endswith('79 modules of unet, 12 modules of text_encoder, rank 6'), said
    parts = [deltas(file, models) for file in files]
    want = {
        k: sum(s * part[k] for part, (_, s) in zip(parts, terms, strict=True)) for k in parts[0]
    }
    got = deltas(out, models)
    assert got.keys() == want.keys() and relative(got, want) < 1e-3  # the file is float16
    assert 'lcm_jax.accelerates' not in open_tensors(out)[1]
    # Down to rank 2: the error is that of the SVD of every full update.
    out = tmp_path / 'two.safetensors'
    said = verbs.merge_loras(terms, out, random_folder, rank=2)
    left = [np.linalg.svd(matrix(x), compute_uv=False)[2:] for x in want.values()]
    least = np.linalg.norm(np.concatenate(left)) / np.linalg.norm(
        [np.linalg.norm(x) for x in want.values()]
    )
    assert said.endswith(f'rank 2, relative error {least:.2e}')
    assert abs(relative(deltas(out, models), want) - least) < 1e-3


def matrix(delta):
    return np.reshape(delta, (-1, delta.shape[-1]))


@pytest.fixture
def tuned(random_folder, tmp_path):
    """tuned(rank): the random folder plus updates of that rank in all kernels, and one bias."""

    def make(rank):
        folder = shutil.copytree(random_folder, tmp_path / 'tuned')
        rng = np.random.default_rng(0)
        for file in WEIGHTS.values():
            tensors, metadata = read_tensors(folder / file)
            for key, x in tensors.items():
                if x.ndim > 1 and 'embedding' not in key:
                    a, b = rng.normal(size=(x.shape[0], rank)), rng.normal(size=(rank, x[0].size))
                    tensors[key] = x + np.float32(0.01 * a @ b).reshape(x.shape)
            tensors[next(k for k in tensors if k.endswith('bias'))] += 1e-3
            write_tensors(folder / file, tensors, metadata)
        return folder

    return make


@pytest.mark.parametrize('rank', [2, 1])
def test_extract(random_folder, models, tuned, tmp_path, rank):
    folder, out = tuned(2), tmp_path / 'x.safetensors'
    said = verbs.extract_lora(random_folder, folder, out, rank)
    assert f'rank {rank}, relative error' in said and '; 2 other tensors differ (biases' in said
    want = {}
    for part in models:
        before, after = (dict(named(open_model(f).load(part))) for f in (random_folder, folder))
        want |= {
            (part, p): np.asarray(after[p] - before[p]) for p in before if p.endswith('kernel')
        }
    got = deltas(out, models)
    moved = {k: x for k, x in want.items() if np.abs(x).max() > 0}
    assert got.keys() == moved.keys()
    left = [np.linalg.svd(matrix(x), compute_uv=False)[rank:] for x in moved.values()]
    whole = np.linalg.norm([np.linalg.norm(x) for x in moved.values()])
    least = np.linalg.norm(np.concatenate(left)) / whole
    assert abs(relative(got, moved) - least) < 1e-3
    assert abs(float(said.split('relative error ')[1].split(';')[0]) - least) < 1e-3 * max(
        least, 0.01
    )


@pytest.mark.parametrize('fast', [False, True])
def test_the_difference_to_a_model_of_few_steps_accelerates(random_folder, tuned, tmp_path, fast):
    folder, out = tuned(1), tmp_path / 'x.safetensors'
    config = folder / 'scheduler/scheduler_config.json'
    if fast:
        config.write_text(config.read_text().replace('DDIMScheduler', 'LCMScheduler'))
    verbs.extract_lora(random_folder, folder, out, 1)
    assert open_tensors(out)[1].get('lcm_jax.accelerates') == ('true' if fast else None)


def test_the_randomized_svd_is_near_the_best():
    rng = np.random.default_rng(0)
    for shape in ((3, 3, 30, 200), (400, 150)):
        rows = int(np.prod(shape[:-1]))
        q, p = (np.linalg.qr(rng.normal(size=(n, 150)))[0] for n in (rows, shape[-1]))
        delta = np.float32((q * np.linspace(1, 0.2, 150)) @ p.T).reshape(shape)  # a flat spectrum
        pair, error = algebra.factored(delta, 8)
        least = np.linalg.norm(np.linalg.svd(matrix(delta), compute_uv=False)[8:])
        assert pair['down'].shape[-1] == 8 and least < error < 1.02 * least
        assert np.isclose(np.linalg.norm(matrix(lora.delta(pair) - delta)), error, rtol=1e-4)


def test_text_encoders_of_a_pipeline_are_adapted(random_folder, models, tmp_path):
    file = foreign(models, 'kohya', tmp_path / 'f.safetensors')
    pipe = Pipeline.load(random_folder)
    plain = pipe.encode_text(['a cat'])
    pipe.add_lora(file, scale=0.5)
    adapters, _ = read_lora(file, models)
    for part in models:
        want = lora.merge(pipe.params[part], [(adapters[part], 0.5)])
        assert relative(pipe.merged[part], want) < 1e-6
    assert relative(pipe.encode_text(['a cat']), plain) > 0.01
    pipe.set_scale('f', 0.0)
    jax.tree.map(np.testing.assert_array_equal, pipe.encode_text(['a cat']), plain)


def test_refusals(lora_file, random_folder, models, tmp_path):
    out, bad = tmp_path / 'out.safetensors', random_folder / WEIGHTS['unet']
    same = shutil.copytree(random_folder, tmp_path / 'same')
    there, term = same / 'there.safetensors', (lora_file, 1.0)
    there.write_bytes(b'precious')
    taken = r'there\.safetensors exists already; choose another name'
    for call, said in (
        (lambda: describe.inspect_lora(tmp_path / 'nope.safetensors'), 'no such file'),
        (lambda: describe.inspect_lora(bad), r'no LoRA factors in a known dialect \(kohya, '),
        (lambda: verbs.convert_lora(lora_file, tmp_path / 'out.bin'), 'must end in .safetensors'),
        (
            lambda: verbs.convert_lora(lora_file, out, random_folder, 'khoya'),
            "unknown LoRA dialect to write 'khoya' .*'kohya'",
        ),
        (lambda: verbs.convert_lora(lora_file, out, tmp_path), 'neither a shipped model'),
        (lambda: verbs.convert_lora(bad, out, random_folder), 'belong to no module'),
        (lambda: verbs.convert_lora(lora_file, there, random_folder), taken),
        (lambda: verbs.merge_loras([term], there, random_folder), taken),
        (lambda: verbs.extract_lora(random_folder, same, there, 4), taken),
        (lambda: verbs.merge_loras([(lora_file, 1.0)], out, random_folder, 0), 'rank = 0'),
        (lambda: verbs.merge_loras([(lora_file, 0.0)], out, random_folder, 1), 'update is zero'),
        (lambda: verbs.extract_lora(random_folder, same, out, 4), 'differ in no layer'),
        (
            lambda: verbs.extract_lora(random_folder, 'emoji', out, 4),
            'not models of the same sizes',
        ),
    ):
        with pytest.raises(InputError, match=said):
            call()
    assert [p.name for p in tmp_path.iterdir()] == ['same'] and there.read_bytes() == b'precious'


def test_an_incomplete_file_can_be_inspected(models, tmp_path):
    adapter = random_lora(models['unet'])
    write_lora(tmp_path / 'f', {'unet': adapter}, models, alpha=4)
    tensors, _ = read_tensors(tmp_path / 'f')
    key = next(k for k in tensors if k.endswith('up.weight'))
    tensors.pop(key)
    write_tensors(tmp_path / 'g', tensors | {'strange': np.ones(3, np.float32)})
    said = describe.inspect_lora(tmp_path / 'g')
    assert (
        'unexplained 1 tensors: strange' in said
        and f'broken      1: {key.split(".")[0]} has down without up' in said
    )
