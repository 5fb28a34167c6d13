"""Whole pictures of every family and task: ours and diffusers' from one folder and one noise."""

import dataclasses
import functools
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import small
import torch
from conftest import randomise
from PIL import Image

import lcm_jax
from lcm_jax import flags, lora, samplers, train
from lcm_jax import pipeline as module
from lcm_jax.convert import convert
from lcm_jax.encode import encoded
from lcm_jax.errors import InputError
from lcm_jax.grid import pixels
from lcm_jax.lora_files.files import write_lora
from lcm_jax.model import describe
from lcm_jax.models import layers
from lcm_jax.pipeline import Pipeline
from lcm_jax.sharding import make_mesh
from lcm_jax.step import program
from lcm_jax.tree import map_named, named

PROMPTS = ['red heart, noto emoji', 'grinning cat, twemoji']
SCHEDULERS = {
    'ddim': functools.partial(diffusers.DDIMScheduler.from_config, clip_sample=False),
    'dpm++': functools.partial(
        diffusers.DPMSolverMultistepScheduler.from_config, timestep_spacing='linspace'
    ),
    'euler': functools.partial(
        diffusers.EulerDiscreteScheduler.from_config, timestep_spacing='leading'
    ),
    'lcm': diffusers.LCMScheduler.from_config,
}
TASKS = {  # task -> diffusers' class for it, of each text-to-image class
    'image': {
        'StableDiffusionPipeline': diffusers.StableDiffusionImg2ImgPipeline,
        'StableDiffusionXLPipeline': diffusers.StableDiffusionXLImg2ImgPipeline,
        'LatentConsistencyModelPipeline': diffusers.LatentConsistencyModelImg2ImgPipeline,
    },
    'inpaint': {
        'StableDiffusionPipeline': diffusers.StableDiffusionInpaintPipeline,
        'StableDiffusionXLPipeline': diffusers.StableDiffusionXLInpaintPipeline,
        'StableDiffusionInpaintPipeline': diffusers.StableDiffusionInpaintPipeline,
    },
}


@pytest.fixture(scope='module', autouse=True)
def quick_exact():
    """Many small programs: compiling them costs more than running them."""
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    with jax.default_matmul_precision('float32'):
        yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """both(model) -> our pipeline and diffusers' of one folder."""

    @functools.cache
    def both(model):
        folder = tmp_path_factory.mktemp(model) / 'pipeline'
        theirs = small.build(model)
        theirs.save_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        return Pipeline.load(folder), theirs

    return both


def psnr(ours, theirs):
    ours, theirs = (pixels(p).astype(float) for p in (ours, theirs))
    assert ours.shape == theirs.shape
    assert ours.std() > 20, 'pictures without content prove nothing'
    return 10 * np.log10(255**2 / max(np.mean((ours - theirs) ** 2), 1e-9))


def picture(seed, width=29, height=41):
    """Coloured noise on a ramp, of another size than the pictures."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 160, width)[None, :, None]
    return Image.fromarray((ramp + rng.integers(0, 90, (height, width, 3))).astype(np.uint8))


def blob(width=31, height=33):
    """A mask with soft edges."""
    y, x = np.mgrid[:height, :width]
    grey = 255 * np.exp(-(((y - 12) / 9) ** 2) - ((x - 17) / 8) ** 2)
    return Image.fromarray(grey.astype(np.uint8))


def feed(monkeypatch, theirs, seed, n, total, encoded):
    """Gives diffusers the noise that we draw: start, steps, and that of the pictures encoded."""
    noise = samplers.fresh(module._keys(np.uint32(seed), np.uint32(0), n))

    def source(numbers):
        def randn(shape, **kwargs):
            b, c, h, w = shape
            return torch.tensor(np.asarray(noise(next(numbers), (b, h, w, c)))).permute(0, 3, 1, 2)

        return randn

    for where, numbers in (
        (sys.modules[type(theirs).__module__], [total]),
        (sys.modules['diffusers.models.autoencoders.vae'], encoded),
        (sys.modules['diffusers.schedulers.scheduling_lcm'], range(99)),
    ):
        monkeypatch.setattr(where, 'randn_tensor', source(iter(numbers)))


def draw_theirs(
    monkeypatch, base, task, sampler, *, steps, strength=None, size=None, vae=None, **options
):
    """What our arguments mean, asked of diffusers."""
    theirs = base
    if task != 'text':
        theirs = TASKS[task][type(base).__name__].from_pipe(base)
        theirs.set_progress_bar_config(disable=True)
        theirs.vae = vae or base.vae
    theirs.scheduler = scheduler = SCHEDULERS[sampler](base.scheduler.config)
    arguments = {'num_inference_steps': steps, 'guidance_scale': options['guidance']}
    if options.get('negative') is not None:
        arguments['negative_prompt'] = [options['negative']] * len(PROMPTS)
    for mine, other in (
        ('original_size', 'original_size'),
        ('crop', 'crops_coords_top_left'),
        ('target_size', 'target_size'),
        ('timesteps', 'timesteps'),
    ):
        if mine in options:
            arguments[other] = options[mine]
    if strength is not None:
        arguments['strength'] = strength
        if sampler == 'lcm' and 'LatentConsistency' not in type(theirs).__name__:
            # the LCM's own strength schedule, which only its own pipeline asks for
            scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, strength=strength)
            theirs.get_timesteps = lambda n=steps, *_, **__: (scheduler.timesteps, n)
    if task != 'text':
        arguments['image'] = [options['image']] * len(PROMPTS)
    if task == 'inpaint':
        arguments['mask_image'] = [options['mask']] * len(PROMPTS)
        arguments['height'], arguments['width'] = size
    total = scheduler.config.num_train_timesteps
    encoded = [total + 1, total + 2]
    if base.unet.config.in_channels == 9 and strength == 1:
        encoded = encoded[1:]  # the picture itself is not encoded
    feed(monkeypatch, theirs, options['seed'], len(PROMPTS), total, encoded)
    return theirs(list(PROMPTS), **arguments).images


SIZES = {'original_size': (24, 56), 'crop': (2, 4), 'target_size': (40, 16)}
OWN = [801, 501, 90, 0]  # a user's own times
IMAGE = {'image': picture(0), 'strength': 0.7}
MASK = {'image': picture(0), 'mask': blob(), 'size': (16, 16)}


@pytest.mark.parametrize(
    ('model', 'task', 'sampler', 'options'),
    [
        ('sd', 'text', 'ddim', {'guidance': 7.5, 'negative': 'sad face'}),
        ('sd', 'text', 'dpm++', {'guidance': 1.0}),
        ('sd', 'text', 'euler', {'guidance': 7.5}),
        ('sd', 'text', 'lcm', {'guidance': 1.0}),
        ('sd', 'image', 'ddim', {'guidance': 1.0, **IMAGE}),
        ('sd', 'image', 'dpm++', {'guidance': 7.5, 'negative': 'sad face', **IMAGE}),
        ('sd', 'image', 'euler', {'guidance': 1.0, **IMAGE}),
        ('sd', 'image', 'lcm', {'guidance': 7.5, **IMAGE}),
        ('sd', 'inpaint', 'ddim', {'guidance': 7.5, **MASK, 'strength': 1.0}),
        ('sd', 'inpaint', 'dpm++', {'guidance': 1.0, **MASK, 'strength': 0.7}),
        ('sd', 'inpaint', 'euler', {'guidance': 7.5, 'negative': 'sad', **MASK, 'strength': 0.7}),
        ('sd', 'inpaint', 'lcm', {'guidance': 1.0, **MASK, 'strength': 0.7}),
        ('sd', 'image', 'dpm++', {'guidance': 7.5, 'timesteps': OWN, **IMAGE}),
        ('sd', 'inpaint', 'lcm', {'guidance': 1.0, 'timesteps': OWN, **MASK, 'strength': 1.0}),
        ('sd2', 'text', 'ddim', {'guidance': 7.5}),
        ('sd2', 'image', 'euler', {'guidance': 7.5, **IMAGE}),
        ('inpaint', 'inpaint', 'ddim', {'guidance': 7.5, **MASK, 'strength': 1.0}),
        ('inpaint', 'inpaint', 'dpm++', {'guidance': 1.0, **MASK, 'strength': 1.0}),
        ('inpaint', 'inpaint', 'euler', {'guidance': 7.5, **MASK, 'strength': 0.7}),
        ('inpaint', 'inpaint', 'lcm', {'guidance': 1.0, **MASK, 'strength': 0.7}),
        ('lcm', 'text', 'lcm', {'guidance': 8.0}),
        ('lcm', 'image', 'lcm', {'guidance': 3.0, **IMAGE}),
        ('sdxl', 'text', 'euler', {'guidance': 7.5}),
        ('sdxl', 'text', 'euler', {'guidance': 7.5, 'negative': 'sad face'}),
        ('sdxl', 'text', 'euler', {'guidance': 7.5, **SIZES}),
        ('sdxl', 'text', 'lcm', {'guidance': 1.0}),
        ('sdxl', 'image', 'ddim', {'guidance': 7.5, **IMAGE}),
        ('sdxl', 'inpaint', 'dpm++', {'guidance': 1.0, **MASK, 'strength': 0.7}),
        ('ssd1b', 'text', 'ddim', {'guidance': 7.5, 'negative': ''}),
        ('ssd1b', 'image', 'euler', {'guidance': 1.0, **IMAGE}),
    ],
)
def test_diffusers_gives_our_pictures(both, monkeypatch, model, task, sampler, options):
    ours, theirs = both(model)
    options = {'steps': 4, 'seed': 5, **options}
    reference = draw_theirs(monkeypatch, theirs, task, sampler, **options)
    reached = psnr(ours(PROMPTS, sampler=sampler, **options), reference)
    print(f'{model}, {task}, {sampler}: {reached:.1f} dB')
    assert reached >= 40


def test_a_zero_snr_model_is_drawn_as_its_folder_says(both, monkeypatch, tmp_path):
    """Trailing times and rescaled betas, as diffusers' DDIM reads them; SD 2's program serves."""
    theirs = small.build('sd2', rescale_betas_zero_snr=True, timestep_spacing='trailing')
    theirs.save_pretrained(tmp_path)
    ours, options = Pipeline.load(tmp_path), {'steps': 4, 'seed': 5, 'guidance': 7.5}
    reference = draw_theirs(monkeypatch, theirs, 'text', 'ddim', **options)
    assert psnr(ours(PROMPTS, sampler='ddim', **options), reference) >= 40
    plain, _ = both('sd2')
    assert psnr(plain(PROMPTS, sampler='ddim', **options), reference) < 30


def test_previews_by_a_tiny_autoencoder(both, monkeypatch, tmp_path):
    ours, theirs = both('sd')
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    randomise(tiny, 7).save_pretrained(tmp_path)
    preview = Pipeline.load(ours.checkpoint.folder, vae=tmp_path)
    options = {'steps': 4, 'seed': 5, 'guidance': 1.0, **IMAGE}
    reference = draw_theirs(monkeypatch, theirs, 'image', 'euler', vae=tiny, **options)
    assert psnr(preview(PROMPTS, sampler='euler', **options), reference) >= 40


@pytest.mark.parametrize('model', ['sd', 'sdxl'])
@pytest.mark.parametrize('skip', [0, 1])
def test_clip_skip(both, model, skip):
    ours, theirs = both(model)
    ids = torch.tensor(ours.tokenizers[0](PROMPTS))
    encoders = [getattr(theirs, name) for name in ours.family.text_encoders]
    with torch.no_grad():
        outs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        if model == 'sd':  # transformers 5 has no `text_model`, where diffusers looks for the norm
            want = encoders[0].final_layer_norm(outs[0].hidden_states[-1 - skip])
        else:
            want = torch.cat([out.hidden_states[-2 - skip] for out in outs], -1)
    got = ours.encode_text(PROMPTS, skip)
    np.testing.assert_allclose(got['context'], want, atol=1e-5)
    if model == 'sdxl':
        np.testing.assert_allclose(got['pooled'], outs[1].text_embeds, atol=1e-5)


def write_two_loras(ours, folder):
    """Two adapters of different ranks and modules -> ({name: adapter}, {name: file})."""
    made, files = {}, {}
    for seed, (name, rank, targets) in enumerate(
        (('style', 3, lora.LCM_TARGETS), ('speed', 2, r'.*(to_q|to_out\.0|conv1)/kernel'))
    ):
        rng = np.random.default_rng(seed)
        made[name] = {
            path: {'down': ab['down'], 'up': np.float32(rng.normal(size=ab['up'].shape) / 4)}
            for path, ab in lora.init(
                jax.random.key(seed), ours.params['unet'], rank, targets
            ).items()
        }
        files[name] = folder / f'{name}.safetensors'
        options = {'alpha': 2.0, 'dtype': np.float32}
        write_lora(files[name], {'unet': made[name]}, ours.params, **options)
    return made, files


def test_two_loras_are_the_sum_of_their_updates(both, monkeypatch, tmp_path):
    ours, theirs = both('sd')
    made, files = write_two_loras(ours, tmp_path)
    scales = {'style': 1.0, 'speed': 0.8}
    options = {'steps': 4, 'seed': 5, 'guidance': 7.5}
    plain = ours(PROMPTS, sampler='ddim', **options)
    for name, file in files.items():
        ours.add_lora(file, scale=scales[name])
        theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name=name)
    theirs.set_adapters([*scales], [*scales.values()])

    def bake(path, w):  # in another way: in float64, all at once
        w = np.asarray(w, np.float64)
        for name, adapter in made.items():
            if path in adapter:
                down, up = (np.float64(adapter[path][k]) for k in ('down', 'up'))
                w = w + scales[name] * (down @ up)
        return np.float32(w)

    baked = ours.params | {'unet': map_named(bake, ours.params['unet'])}
    try:
        live = ours(PROMPTS, sampler='ddim', **options)
        reference = draw_theirs(monkeypatch, theirs, 'text', 'ddim', **options)
        assert psnr(live, reference) >= 40
        assert psnr(plain, reference) < 30
        once = dataclasses.replace(ours, merged=baked)(PROMPTS, sampler='ddim', **options)
        assert np.abs(pixels(live).astype(int) - pixels(once)).max() <= 1

        traces = []
        for where, name in ((samplers, 'sample'), (lora, 'delta')):
            function = getattr(where, name)
            monkeypatch.setattr(
                where, name, lambda *args, f=function: (traces.append(f), f(*args))[1]
            )
        for scale in (0.3, 0, 1, -2.0):
            ours.set_scale('speed', scale)
            ours(PROMPTS, sampler='ddim', **options)
        assert not traces
        ours.set_scale('style', 0.0)
        ours.set_scale('speed', 0.0)
        assert (pixels(ours(PROMPTS, sampler='ddim', **options)) == pixels(plain)).all()
        ours(PROMPTS, sampler='ddim', **options | {'steps': 3})
        assert traces  # another number of steps does trace
    finally:
        theirs.unload_lora_weights()
        for name in [*ours.adapters]:
            ours.remove_lora(name)


def test_adapters_reach_the_text_encoders(both, tmp_path):
    ours, _ = both('sdxl')
    before = ours.encode_text(PROMPTS)
    paths = ('text_encoder', 'text_encoder_2')
    made = {
        part: {
            path: ab | {'up': ab['up'] + 0.1}
            for path, ab in lora.init(
                jax.random.key(0), ours.params[part], 2, r'.*q_proj/kernel'
            ).items()
        }
        for part in paths
    }
    file = tmp_path / 'text.safetensors'
    bases = {part: ours.params[part] for part in ('unet', *paths)}
    write_lora(file, made, bases, alpha=2, dtype=np.float32)
    ours.add_lora(file)
    try:
        for part in paths:
            before_part, after_part = (dict(named(p[part])) for p in (ours.params, ours.merged))
            for path, ab in made[part].items():
                want = before_part[path] + lora.delta(ab)
                np.testing.assert_allclose(after_part[path], want, rtol=1e-6, atol=1e-6)
        after = ours.encode_text(PROMPTS)
        assert all(np.abs(after[k] - before[k]).max() > 1e-2 for k in before)
        assert ours.merged['unet'] is ours.params['unet']
    finally:
        ours.remove_lora('text')


def test_training_is_told_what_drawing_is(both):
    """The conditions of SDXL in a training step; the loss takes them."""
    ours, _ = both('sdxl')
    file = Path(__file__).parents[1] / 'configs' / 'default.py'
    config = flags.read(file, {'data.resolution': 16, 'train.batch': 2, 'lora.rank': 2})
    prog = program(ours.specs, ours.family, ours.schedule, config, make_mesh())
    batch = {
        'row': np.arange(2, dtype=np.int32),
        'pixels': np.stack([np.asarray(picture(i, 16, 16)) for i in range(2)]),
        'ids': np.stack([tokenizer(PROMPTS) for tokenizer in ours.tokenizers], 1),
        'sizes': np.repeat(np.asarray(ours.sizes((16, 16))['sizes']), 2, 0),
    }
    assert {k: x.shape for k, x in batch.items()} == {
        k: x.shape for k, x in prog.batch((16, 16)).items()
    }
    parts = {part: ours.specs[part] for part in ('vae', *ours.family.text_encoders)}
    got, want = encoded(parts, ours.params, batch), ours.encode_text(PROMPTS)
    for name in ('context', 'pooled'):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    null = train.conditions(describe(ours.checkpoint.folder), ours.params, config, (16, 16))['null']
    assert not any(null[name].any() for name in ('context', 'pooled'))
    out = jax.eval_shape(
        prog.loss, prog.state.params, prog.state.ema, prog.frozen, batch, jax.random.key(0)
    )
    assert out.shape == ()


def test_strength_of_an_lcm_compiles_nothing_anew(both, monkeypatch):
    ours, _ = both('sd')
    options = {'sampler': 'lcm', 'steps': 4, 'guidance': 7.5, 'image': picture(0)}
    ours(PROMPTS, **options, strength=0.7)
    traces, sample = [], samplers.sample
    monkeypatch.setattr(samplers, 'sample', lambda *args: (traces.append(1), sample(*args))[1])
    drawn = [pixels(ours(PROMPTS, **options, strength=s)).astype(int) for s in (0.4, 0.9)]
    assert np.abs(drawn[0] - drawn[1]).max() > 20
    assert not traces


def test_pictures_do_not_depend_on_the_batch_around_them(both):
    ours, _ = both('sd')
    options = {'sampler': 'lcm', 'steps': 4, 'guidance': 1.0, **MASK, 'strength': 0.7, 'seed': 3}
    options['image'] = [picture(0), picture(1)]
    both_drawn = pixels(ours(PROMPTS, **options)).astype(int)
    options['image'] = picture(0)
    assert np.abs(pixels(ours(PROMPTS, **options))[:1] - both_drawn[:1]).max() <= 1
    assert np.abs(pixels(ours(PROMPTS, **options))[1:] - both_drawn[1:]).max() > 20


MESH = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from PIL import Image
    from lcm_jax import Pipeline
    from lcm_jax.checkpoint import open_model
    from lcm_jax.grid import pixels

    folder, prompts = sys.argv[1], sys.argv[2:]
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))

    def split(x):
        where = (*[None] * (x.ndim - 1), 'data') if x.ndim > 1 and x.shape[-1] % 2 == 0 else ()
        return NamedSharding(mesh, PartitionSpec(*where))

    unet = jax.tree.map(split, open_model(folder).shapes('unet'))
    pipe = Pipeline.load(folder, mesh=mesh, sharding={'unet': unet})
    for part, partly in ('unet', True), ('vae', False):
        placed = [x.sharding for x in jax.tree.leaves(pipe.params[part])]
        assert all(len(x.device_set) == 2 for x in placed)
        assert any(not x.is_fully_replicated for x in placed) == partly
    text = {'sampler': 'euler', 'guidance': 7.5}
    image, mask = (Image.open(f'{folder}/{name}.png') for name in ('image', 'mask'))
    inpaint = {'sampler': 'dpm++', 'guidance': 1.0, 'image': image, 'mask': mask}
    for name, options in ('text', text), ('inpaint', inpaint | {'strength': 0.7, 'size': (16, 16)}):
        np.save(f'{folder}/{name}.npy', pixels(pipe(prompts, steps=4, seed=5, **options)))
    usual = Pipeline.load(folder, mesh=jax.make_mesh((2,), ('data',)))  # JAX's own kind of axis
    assert len(usual(prompts[0], sampler='euler', steps=1, guidance=1.0)) == 1
"""


def test_a_mesh_draws_the_same_pictures(both):
    """Three pictures on two devices, so one of them is drawn twice; the first two here, alone.

    The UNet's parameters lie in parts on both, the others whole.
    """
    ours, _ = both('sdxl')
    folder, root = ours.checkpoint.folder, Path(lcm_jax.__file__).parents[1]
    MASK['image'].save(folder / 'image.png')
    MASK['mask'].save(folder / 'mask.png')
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(MESH), str(folder), *PROMPTS, 'dog'],
        env={
            'HOME': str(folder),
            'JAX_DEFAULT_MATMUL_PRECISION': 'float32',
            'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
            'JAX_PLATFORMS': 'cpu',
            'PATH': '/usr/bin:/bin',
            'PYTHONPATH': str(root),
            'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
        },
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
    options = {'steps': 4, 'seed': 5}
    for name, drawn in (
        ('text', ours(PROMPTS, sampler='euler', guidance=7.5, **options)),
        ('inpaint', ours(PROMPTS, sampler='dpm++', guidance=1, strength=0.7, **MASK, **options)),
    ):
        many = np.load(folder / f'{name}.npy')
        assert many.shape == (3, 16, 16, 3) and many.std() > 20
        assert np.abs(many[:2].astype(int) - pixels(drawn)).max() <= 1, name


def test_strips_draw_the_same_pictures(both, monkeypatch):
    """As on TPUs, which cut pictures into strips."""
    ours, cut = both('sdxl')[0], []
    options = {'image': picture(0), 'mask': blob(), 'size': (64, 96), 'steps': 2, 'guidance': 3.0}
    whole = ours(PROMPTS[0], **options)
    monkeypatch.setattr(module, '_platform', lambda mesh: 'tpu')
    to_strips = layers.to_strips
    monkeypatch.setattr(layers, 'to_strips', lambda x, n: cut.append(n) or to_strips(x, n))
    assert psnr(ours(PROMPTS[0], **options), whole) >= 60
    assert len(cut) >= 3 and min(cut) > 1  # VAE encoder, UNet, VAE decoder


def test_a_single_file_draws_what_its_folder_draws(both, tmp_path):
    ours, _ = both('sd')
    convert(ours.checkpoint.folder, tmp_path / 'model.safetensors')
    single = Pipeline.load(tmp_path / 'model.safetensors')
    options = {'sampler': 'euler', 'steps': 4, 'guidance': 7.5}
    assert (pixels(single(PROMPTS, **options)) == pixels(ours(PROMPTS, **options))).all()
    v = Pipeline.load(tmp_path / 'model.safetensors', prediction_type='v_prediction')
    assert v.schedule.prediction_type == 'v_prediction'


@pytest.mark.parametrize(
    ('part', 'named'),
    [
        ('text_encoder', 'the text encoder gave NaN or infinity in float32; look for broken'),
        ('unet', 'the UNet gave'),
        ('vae', 'the VAE decoder gave'),
    ],
)
def test_pictures_that_are_not_finite_are_refused(both, part, named):
    ours, _ = both('sd')

    def spoil(path, w):
        return w * np.float32(np.nan) if path.endswith(('conv_out/bias', 'fc2/bias')) else w

    broken = ours.merged | {part: map_named(spoil, ours.merged[part])}
    with pytest.raises(InputError, match=f'2 of 2 pictures are not finite: {named}'):
        dataclasses.replace(ours, merged=broken)(PROMPTS, sampler='lcm', steps=4, guidance=1.0)


def test_half_precision_draws_finite_pictures(both):
    ours, _ = both('sd')
    half = Pipeline.load(ours.checkpoint.folder, jax.numpy.bfloat16)
    options = {'sampler': 'euler', 'steps': 4, 'guidance': 7.5}
    assert 20 < psnr(half(PROMPTS, **options), ours(PROMPTS, **options)) < 80


@pytest.mark.parametrize(
    ('model', 'options', 'said'),
    [
        ('sd', {'strength': 0.5}, 'strength = 0.5 without an image'),
        ('sd', {**IMAGE, 'strength': 0}, 'strength = 0; a number above 0, at most 1'),
        ('sd', {**IMAGE, 'strength': 1.2}, 'strength = 1.2; a number above 0, at most 1'),
        (
            'sd',
            {**IMAGE, 'strength': 0.3, 'steps': 3, 'sampler': 'ddim'},
            r'strength 0.3 of 3 steps leaves none; .* at least 0\.3334, or at least 4 steps',
        ),
        (
            'sd',
            {**IMAGE, 'strength': 0.1, 'steps': 6, 'sampler': 'lcm'},
            '6 LCM steps; at most 5 at strength 0.1',
        ),
        ('sd', {**IMAGE, 'timesteps': [500]}, r'strength 0\.7 of 1 steps leaves none'),
        ('sd', {'timesteps': [500], 'spacing': 'trailing'}, "spacing 'trailing' beside timesteps"),
        ('sd', {'guidance': float('nan')}, 'guidance = nan; a number of 0 or more'),
        ('sd', {'mask': blob()}, 'a mask without an image'),
        ('sd', {'image': 'cat.png'}, 'image is a str; give a PIL image'),
        ('sd', {'image': [picture(0)] * 3}, '3 images for 2 prompts'),
        ('sd', {'image': picture(0), 'mask': blob().convert('F')}, 'a picture of mode F, of no kn'),
        ('sd', {'image': picture(0, 1, 9)}, 'size 8 x 0: both must be multiples of 2 px'),
        ('sd', {'original_size': (16, 16)}, 'told to SDXL models only'),
        ('sd', {'clip_skip': 3}, 'clip_skip = 3; a whole number from 0 to 2'),
        ('sdxl', {'clip_skip': -1}, 'clip_skip = -1; a whole number from 0 to 1'),
        ('inpaint', {}, 'this UNet is made for inpainting: give an image and a mask'),
        ('inpaint', IMAGE, 'this UNet is made for inpainting'),
    ],
)
def test_what_is_refused(both, model, options, said):
    with pytest.raises(InputError, match=said):
        both(model)[0](PROMPTS, **options)


def test_a_negative_prompt_beside_embedded_guidance_warns(both):
    ours, _ = both('lcm')
    with pytest.warns(UserWarning, match='no effect with this model, which takes guidance'):
        ours(PROMPTS, negative='sad', steps=4)  # by default as the family draws: lcm


@pytest.mark.parametrize(('model', 'usual'), [('sd', 7.5), ('sdxl', 5.0)])
def test_a_full_lcm_has_one_default_of_guidance_whatever_its_class(both, model, usual):
    ours, _ = both(model)
    assert ours.manner(None, None, None, False) == ('ddim', usual, True)
    unet = dataclasses.replace(ours.specs['unet'], w_dim=8)
    lcm = dataclasses.replace(ours, specs=ours.specs | {'unet': unet})
    assert lcm.manner(None, None, None, False) == ('lcm', 8.5, False)


def test_a_long_prompt_is_cut_aloud(both):
    ours, theirs = both('sdxl')
    long = 'red heart ' * 20
    with pytest.raises(InputError, match=r'prompt of 42 tokens .* at most 32'):
        ours.encode_text([long])
    with pytest.warns(UserWarning, match=r"42 tokens cut to 32 .*left out: '(red heart ?){5}'"):
        got = ours.encode_text([long], truncate=True)
    with torch.no_grad():
        want = theirs.encode_prompt(long, device='cpu', do_classifier_free_guidance=False)
    np.testing.assert_allclose(got['context'], want[0], atol=1e-5)
