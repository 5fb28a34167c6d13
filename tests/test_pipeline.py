"""Pictures: ours and diffusers' from one folder and noise; what a user may ask, what is refused."""

import json
import shutil
import warnings
import weakref

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import write_random_lora

from lcm_jax import adapters, conditioning, lora, samplers
from lcm_jax import pipeline as module
from lcm_jax.data.emoji import EMOJI
from lcm_jax.draw import draw
from lcm_jax.errors import InputError
from lcm_jax.grid import pixels
from lcm_jax.pipeline import Pipeline
from lcm_jax.request import manner
from lcm_jax.tensors import read_tensors, write_tensors

PROMPTS = ['red heart, noto emoji', 'grinning cat, twemoji']
QUICK = {'sampler': 'ddim', 'steps': 2, 'guidance': 1.0}  # many tests share one compiled program
SCHEDULERS = {
    'ddim': lambda config: diffusers.DDIMScheduler.from_config(config),
    'dpm++': lambda config: diffusers.DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing='linspace'
    ),
    'lcm': lambda config: diffusers.LCMScheduler.from_config(config),
}


@pytest.fixture(autouse=True)
def float32():
    with jax.default_matmul_precision('float32'):
        yield


@pytest.fixture(scope='module')
def both():
    """Our pipeline and diffusers' of the shipped emoji model; test_pictures.py has all families."""
    folder = EMOJI / 'pipeline'
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return Pipeline.load(folder), theirs


@pytest.fixture(scope='module')
def pipe(random_folder):
    return Pipeline.load(random_folder)


def psnr(ours, theirs):
    ours, theirs = (pixels(p).astype(float) for p in (ours, theirs))
    assert ours.shape == theirs.shape
    assert ours.std() > 20, 'pictures without content prove nothing'
    return 10 * np.log10(255**2 / max(np.mean((ours - theirs) ** 2), 1e-9))


def start(pipe, count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *pipe.latent_shape())).astype(np.float32)


def draw_theirs(theirs, prompts, latents, sampler, **kwargs):
    scheduler = theirs.scheduler
    theirs.scheduler = SCHEDULERS[sampler](scheduler.config)
    try:
        return theirs(
            list(prompts), latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **kwargs
        ).images
    finally:
        theirs.scheduler = scheduler


@pytest.mark.parametrize(
    ('sampler', 'steps', 'guidance', 'negative'),
    [
        ('ddim', 20, 1.0, None),
        ('ddim', 20, 7.5, None),
        ('ddim', 20, 7.5, 'sad face'),
        ('dpm++', 12, 1.0, None),
        ('dpm++', 20, 5.0, None),
    ],
)
def test_diffusers_gives_our_pictures(both, sampler, steps, guidance, negative):
    ours, theirs = both
    z = start(ours, len(PROMPTS))
    reference = draw_theirs(
        theirs,
        PROMPTS,
        z,
        sampler,
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt=negative and [negative] * len(PROMPTS),
    )
    mine = ours(
        PROMPTS, sampler=sampler, steps=steps, guidance=guidance, negative=negative, latents=z
    )
    assert psnr(mine, reference) >= 40


@pytest.fixture
def same_noise(monkeypatch):
    """Gives diffusers' LCMScheduler the noise that our sampler draws for a seed and a count."""

    def patch(seed, count):
        keys = module._keys(np.uint32(seed), np.uint32(0), count)
        steps = iter(range(99))

        def noise(shape, **kwargs):
            n, c, h, w = shape
            ours = samplers.fresh(keys)(next(steps), (n, h, w, c))
            return torch.tensor(np.asarray(ours).transpose(0, 3, 1, 2))

        monkeypatch.setattr(diffusers.schedulers.scheduling_lcm, 'randn_tensor', noise)

    return patch


@pytest.mark.parametrize('dialect', ['kohya', 'peft'])
def test_diffusers_gives_our_four_step_pictures_with_our_lora(both, dialect, same_noise, tmp_path):
    ours, theirs = both
    file = write_random_lora(ours.params['unet'], tmp_path / 'lcm.safetensors', dialect=dialect)
    z, same = start(ours, len(PROMPTS)), {'num_inference_steps': 4, 'guidance_scale': 1.0}
    same_noise(3, len(PROMPTS))
    plain = draw_theirs(theirs, PROMPTS, z, 'lcm', **same)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    ours.add_lora(file)
    try:
        same_noise(3, len(PROMPTS))
        reference = draw_theirs(theirs, PROMPTS, z, 'lcm', **same)
        assert psnr(ours(PROMPTS, seed=3, latents=z), reference) >= 40  # lcm, 4 steps, guidance 1
        assert psnr(plain, reference) < 30  # the LoRA does something
    finally:
        theirs.unload_lora_weights()
        ours.remove_lora('lcm')
    same_noise(3, len(PROMPTS))
    assert psnr(ours(PROMPTS, sampler='lcm', steps=4, guidance=1, seed=3, latents=z), plain) >= 40


def test_a_picture_does_not_depend_on_the_batch(pipe):
    def draw(prompt, **kwargs):
        pictures = pipe(prompt, sampler='lcm', steps=3, guidance=2.0, seed=7, **kwargs)
        return pixels(pictures).astype(int)

    four, one, mixed = draw(PROMPTS[0], count=4), draw(PROMPTS[0]), draw(PROMPTS, count=2)
    assert np.abs(four[:1] - one).max() <= 1  # of 255: float32 sums differ by batch
    assert np.abs(four[:2] - mixed[:2]).max() <= 1
    assert np.abs(four[0] - four[1]).max() > 50
    assert np.abs(four[2:] - mixed[2:]).max() > 10  # another prompt


def test_only_shapes_and_steps_compile_anew(pipe, lora_file):
    options = QUICK | {'guidance': 4.0}
    pipe(PROMPTS[0], **options)
    pipe.add_lora(lora_file, name='warm')
    pipe.remove_lora('warm')
    programs = draw, lora._add, conditioning.encode_text, module._keys
    before = [p._cache_size() for p in programs]
    pipe(PROMPTS[1], **options | {'guidance': 5}, seed=3, negative='sad')
    pipe(PROMPTS[1], **options, timesteps=[900, 100])
    pipe.add_lora(lora_file, scale=1)
    for scale in (0.5, 0, -1.0):
        pipe.set_scale('style', scale)
        pipe(PROMPTS[0], **options)
    pipe.remove_lora('style')
    assert [p._cache_size() for p in programs] == before
    pipe(PROMPTS[0], **options | {'steps': 3})
    assert draw._cache_size() == before[0] + 1


def test_loras_come_and_go(pipe, lora_file):
    def draw():
        return pixels(pipe(PROMPTS[0], **QUICK)).astype(int)

    plain = draw()
    pipe.add_lora(lora_file)
    styled = draw()
    assert np.abs(styled - plain).max() > 20
    pipe.add_lora(lora_file, name='twice', scale=-1.0)  # updates add up
    assert np.abs(draw() - plain).max() <= 1
    pipe.set_scale('twice', 0.0)
    assert (draw() == styled).all()
    with pytest.raises(InputError, match=r"unknown LoRA 'stile' .*'style'.*: style, twice"):
        pipe.set_scale('stile', 1.0)
    with pytest.raises(InputError, match="'style' is loaded already"):
        pipe.add_lora(lora_file)
    for scale in (None, 'half', float('nan'), np.ones(2)):  # nothing changes
        with pytest.raises(InputError, match=r'scale .* of a LoRA; give a number'):
            pipe.set_scale('style', scale)
        with pytest.raises(InputError, match=r'scale .* of a LoRA; give a number'):
            pipe.set_loras([(lora_file, scale)])
    assert (draw() == styled).all()
    pipe.remove_lora('style')
    pipe.remove_lora('twice')
    assert (draw() == plain).all()
    with pytest.raises(InputError, match="unknown LoRA 'style'"):
        pipe.remove_lora('style')


def test_loras_are_set_together_even_if_their_files_have_one_name(pipe, lora_file, tmp_path):
    other = shutil.copy(lora_file, tmp_path / lora_file.name)
    pipe.set_loras([(lora_file, 1.0)])
    styled = pixels(pipe(PROMPTS[0], **QUICK)).astype(int)
    pipe.set_loras([(lora_file, 0.25), (other, 0.75)])
    assert np.abs(pixels(pipe(PROMPTS[0], **QUICK)) - styled).max() <= 1
    with pytest.raises(InputError, match='is given twice'):
        pipe.set_loras([(other, 1.0), (other, 1.0)])
    assert len(pipe.adapters) == 2
    pipe.set_loras([])
    assert not pipe.adapters


def test_the_old_sum_is_let_go_before_the_new_one_is_made(pipe, lora_file, monkeypatch):
    def made(*args):
        assert old() is None
        return merge(*args)

    pipe.add_lora(lora_file)
    adapted = jax.tree.map(lambda x, y: x is not y, pipe.merged['unet'], pipe.params['unet'])
    sums = zip(jax.tree.leaves(pipe.merged['unet']), jax.tree.leaves(adapted), strict=True)
    old = weakref.ref(next(x for x, is_sum in sums if is_sum))
    del sums
    merge = adapters.merge
    monkeypatch.setattr(adapters, 'merge', made)
    pipe.set_scale('style', 0.5)
    pipe.remove_lora('style')


def test_a_list_can_be_drawn_in_parts(pipe):
    whole = pixels(pipe(PROMPTS[:2], **QUICK))
    later = pixels(pipe(PROMPTS[1:2], first=1, **QUICK))
    assert np.abs(whole[1:].astype(int) - later).max() <= 1


def test_an_acceleration_lora_sets_the_defaults_and_warns(pipe, lora_file, tmp_path):
    with warnings.catch_warnings(action='error'):
        pipe(PROMPTS[0], **QUICK | {'guidance': 7.5}, negative='sad')
        pipe.add_lora(lora_file, name='my-lcm')
        fast = pipe(PROMPTS[0])
        pipe(PROMPTS[0], **QUICK | {'guidance': 2})
    same = pipe(PROMPTS[0], sampler='lcm', steps=4, guidance=1.0)
    assert (pixels(fast) == pixels(same)).all()
    with pytest.warns(UserWarning, match='guidance 7.5 with a few-step LoRA or model') as said:
        pipe(PROMPTS[0], **QUICK | {'guidance': 7.5})
    assert said[0].filename == __file__  # the line that asked for it is shown
    with pytest.warns(UserWarning, match='guidance 7.5 with the LCM sampler burns'):
        manner('lcm', 7.5, None, fast=False, embedded=False, default=7.5)
    assert manner('lcm', None, None, fast=False, embedded=False, default=7.5) == ('lcm', 1, False)
    assert manner(None, None, None, fast=False, embedded=True, default=7.5) == ('lcm', 7.5, False)
    with pytest.warns(UserWarning, match='negative prompt has no effect at guidance 1'):
        pipe(PROMPTS[0], **QUICK, negative='sad')
    pipe.remove_lora('my-lcm')
    pipe.add_lora(
        write_random_lora(
            pipe.params['unet'],
            tmp_path / 'fast.safetensors',
            metadata={'lcm_jax.accelerates': 'true'},
        )
    )
    assert (pixels(pipe(PROMPTS[0])) == pixels(fast)).all()
    pipe.remove_lora('fast')


def test_latents_timesteps_and_size(pipe):
    def draw(**kwargs):
        return pixels(pipe(PROMPTS[0], **QUICK | kwargs))

    z = start(pipe, 2)
    first, second = draw(latents=z[:1]), draw(latents=z[1:])
    assert np.abs(first.astype(int) - second).max() > 50
    assert (first == draw(latents=z[:1], timesteps=[501, 1])).all()  # DDIM's own
    assert (first == draw(latents=jnp.asarray(z[:1]), timesteps=(501, 1), steps=None)).all()
    assert not (first == draw(latents=z[:1], timesteps=[601, 1])).all()
    assert draw(size=np.array([32, 48])).shape == (1, 32, 48, 3)
    for bad, said in (
        ({'latents': z}, r'latents of shape \(2, 8, 8, 4\); these pictures need \(1, 8, 8, 4\)'),
        ({'timesteps': [1, 501]}, 'falling whole numbers from 999 to 0'),
        ({'timesteps': [1000, 1]}, 'from 999 to 0'),
        ({'timesteps': []}, 'from 999 to 0'),
        ({'timesteps': [501, 1], 'steps': 3}, 'steps = 3 but 2 timesteps'),
        ({'size': (30, 32)}, 'size 30 x 32: both must be multiples of 4 px'),
        ({'size': (0, 32)}, 'multiples of 4 px'),
        ({'size': 32}, 'size = 32; two numbers, heights first'),
        ({'size': (32.0, 32)}, r'a number of size = 32\.0; a whole number from 0'),
        ({'crop': (0, 0, 32, 32)}, r'crop = \(0, 0, 32, 32\); two numbers'),
        ({'steps': 0}, 'steps = 0; ddim takes a whole number from 1 to 999'),
        ({'steps': 51, 'sampler': 'lcm'}, 'lcm takes a whole number from 1 to 50'),
        (
            {'sampler': 'dpm+'},
            r"unknown sampler 'dpm\+' \(did you mean 'dpm\+\+'\?\); one of: ddim",
        ),
        ({'count': 0}, 'count = 0; a whole number from 1 to'),
        ({'seed': -1}, 'seed = -1; a whole number from 0 to 4294967295'),
        ({'seed': 3.9}, r'seed = 3\.9; a whole number'),
        ({'seed': None}, 'seed = None; a whole number'),
        ({'first': -1}, 'first = -1; a whole number from 0 to 4294967295'),
        ({'first': 0.5}, r'first = 0\.5; a whole number'),
        ({'clip_skip': 1.0}, r'clip_skip = 1\.0; a whole number from 0 to 1'),
    ):
        with pytest.raises(InputError, match=said):
            draw(**bad)
    with pytest.raises(InputError, match=r'prompt of 42 tokens .*; this model takes at most 32'):
        pipe('cat ' * 40)
    with pytest.raises(InputError, match='nothing to draw'):
        pipe([])


@pytest.fixture
def copy(random_folder, tmp_path):
    """A folder to damage."""
    return shutil.copytree(random_folder, tmp_path / 'copy')


def test_half_precision_files_load_as_float32(pipe, copy):
    files = [*copy.glob('*/*.safetensors')]
    assert len(files) == 3
    for file in files:
        tensors, _ = read_tensors(file)
        write_tensors(file, {key: x.astype(np.float16) for key, x in tensors.items()})
    half = Pipeline.load(copy)
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype(np.float32)}
    z = start(pipe, 1)
    assert psnr(half(PROMPTS[0], latents=z, **QUICK), pipe(PROMPTS[0], latents=z, **QUICK)) > 30
    bfloat16 = Pipeline.load(copy, jnp.bfloat16)
    for part, params in bfloat16.params.items():
        dtype = jnp.float32 if part == 'vae' else jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}


def edit(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def unknown_key(file):
    tensors, _ = read_tensors(file)
    write_tensors(file, tensors | {'conv_im.weight': tensors['conv_in.weight']})


UNET = 'unet/diffusion_pytorch_model.safetensors'


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (
            lambda f: (f / 'model_index.json').unlink(),
            r'no such file: .*model_index\.json',
        ),
        (
            lambda f: edit(f / 'model_index.json', _class_name='FluxPipeline'),
            r"_class_name = 'FluxPipeline' is not supported; accepted: 'StableDiffusionPipeline'",
        ),
        (lambda f: (f / UNET).unlink(), f'no such file: .*{UNET}'),
        (lambda f: truncate(f / UNET), f'{UNET} is not a readable safetensors file'),
        (lambda f: (f / UNET).write_bytes(b'no'), f'{UNET} is not a readable safetensors file'),
        (lambda f: unknown_key(f / UNET), r"conv_im.weight \(did you mean 'conv_in.weight'\?\)"),
        (
            lambda f: edit(f / 'unet/config.json', in_channels=5),
            r'misshapen: conv_in.weight \(16, 4, 3, 3\)',
        ),
        (
            lambda f: edit(f / 'unet/config.json', act_fn='mish'),
            "unet/config.json: act_fn = 'mish' is not",
        ),
        (lambda f: (f / 'vae/config.json').write_text('{'), 'cannot read .*vae/config.json'),
        (
            lambda f: edit(f / 'scheduler/scheduler_config.json', beta_schedule='cosine'),
            "unknown beta_schedule 'cosine'; one of: scaled_linear, linear",
        ),
        (
            lambda f: edit(f / 'scheduler/scheduler_config.json', prediction_type='eps'),
            "unknown prediction_type 'eps'",
        ),
        (
            lambda f: (f / 'tokenizer/tokenizer.json').unlink(),
            'not a CLIP tokenizer folder; it needs tokenizer.json or vocab.json and merges.txt',
        ),
        (
            lambda f: (f / 'tokenizer/tokenizer.json').write_text('{'),
            'cannot read the tokenizer in .*copy',
        ),
    ],
)
def test_a_damaged_folder_is_named(copy, damage, said):
    damage(copy)
    with pytest.raises(InputError, match=said) as e:
        Pipeline.load(copy)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('dtype', ['fp16', np.int32, 'float64', object])
def test_dtypes_that_do_not_draw_are_refused(random_folder, dtype):
    with pytest.raises(InputError, match=r'unknown dtype .*; one of: float32, bfloat16, float16'):
        Pipeline.load(random_folder, dtype)
    with pytest.raises(InputError, match='unknown vae_dtype'):
        Pipeline.load(random_folder, vae_dtype=dtype)


def test_unknown_model_and_lora(pipe):
    with pytest.raises(InputError, match=r"'emojy' is neither a shipped model .* 'emoji'"):
        Pipeline.load('emojy')
    with pytest.raises(
        InputError, match=r"'lmc' is neither a shipped LoRA \(lcm, fluent\) .*'lcm'"
    ):
        pipe.add_lora('lmc')
    assert not pipe.adapters
