"""Pipeline folders that the tests share, and the order of their files."""

import functools
import shutil

import jax
import numpy as np
import pytest
import tiny
import torch
from random_model import write_model

from lcm_jax import lora
from lcm_jax.checkpoint import open_model
from lcm_jax.data.emoji import EMOJI
from lcm_jax.lora_files.files import write_lora

torch.set_num_threads(1)  # the reference models are tiny; waiting for threads costs more
LONGEST = (
    *('test_train', 'test_notebooks', 'test_trainer_mesh', 'test_trainer_stop'),
    *('test_evaluate', 'test_demo', 'test_export', 'test_models', 'test_pictures'),
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left alone with one at the end."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope='module')
def quick_compiler():
    """Programs that run a few times are compiled quickly."""
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='session')
def model(tmp_path_factory):
    """The folder of the tiny model that runs start from."""
    import runs

    return runs.write_tiny(tmp_path_factory.mktemp('model') / 'tiny')


@pytest.fixture(scope='module')
def filled(model, quick_compiler, tmp_path_factory):
    """A workdir that holds a cache and nothing else."""
    import runs

    workdir = tmp_path_factory.mktemp('filled')
    runs.fill(model, workdir)
    return workdir


@pytest.fixture
def cached(filled, tmp_path):
    """A copy of it for a run."""
    return shutil.copytree(filled, tmp_path / 'run')


@pytest.fixture
def uncompiled(monkeypatch):
    """What is refused is refused before the step is compiled."""
    from lcm_jax import train

    monkeypatch.setattr(train, 'Steps', lambda *_: pytest.fail('compiled'))


def randomise(model, seed):
    """Every parameter at random, norms and biases too, such that activations stay of order one."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            value = 0.2 * rng.normal(size=p.shape) + ('norm' in name and name.endswith('weight'))
        else:
            value = rng.normal(size=p.shape) / np.sqrt(p[0].numel())
        p.data = torch.tensor(value, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope='session')
def random_folder(tmp_path_factory):
    """A Stable Diffusion folder written by diffusers: tiny, random weights, 32 px pictures."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(EMOJI / 'pipeline' / 'tokenizer'))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        down_block_types=('DownEncoderBlock2D',) * 3,
        up_block_types=('UpDecoderBlock2D',) * 3,
    )
    scheduler = DDIMScheduler(
        beta_schedule='scaled_linear',
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing='leading',
    )
    folder = tmp_path_factory.mktemp('random') / 'pipeline'
    StableDiffusionPipeline(
        randomise(vae, 0),
        randomise(text, 1),
        tokenizer,
        randomise(unet, 2),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def tiny_folder(tmp_path_factory):
    """tiny_folder(name) -> the diffusers folder of a row of tiny.MODELS, and its tensors by component."""
    root = tmp_path_factory.mktemp('tiny')
    return functools.cache(lambda name: (root / name, write_model(root / name, tiny.MODELS[name])))


def random_lora(params, scale=0.3):
    """An adapter of every module that LCM-LoRA adapts, strong enough to change pictures."""
    rng = np.random.default_rng(0)
    return {
        path: {'down': ab['down'], 'up': np.float32(scale * rng.normal(size=ab['up'].shape))}
        for path, ab in lora.init(jax.random.key(0), params, 4).items()
    }


def write_random_lora(params, file, **options):
    options = {'alpha': 4.0, 'dtype': np.float32} | options
    write_lora(file, {'unet': random_lora(params)}, {'unet': params}, **options)
    return file


@pytest.fixture(scope='session')
def lora_file(random_folder, tmp_path_factory):
    """A LoRA for the random folder."""
    params = open_model(random_folder).shapes('unet')
    return write_random_lora(params, tmp_path_factory.mktemp('lora') / 'style.safetensors')


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub's client, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return tmp_path / 'hub'
