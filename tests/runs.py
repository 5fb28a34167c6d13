"""Runs of the trainer for the tests: a tiny model, a few synthetic pictures, processes to be killed."""

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from random_model import write_model
from safetensors.numpy import load_file, save_file

from lcm_jax import feed, flags, sharding, train
from lcm_jax.model import describe
from lcm_jax.models.clip import TextSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec
from lcm_jax.models.zoo import ModelSpec
from lcm_jax.tree import named

PATIENCE = 'from lcm_jax import peers, train; peers.LOST = {}; train.main()'
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
MODEL = ModelSpec(  # 16 px pictures, 8 x 8 latents
    UNetSpec(
        widths=(8,),
        down=((1,),),
        mid=None,
        up=((0, 0),),
        heads=(2,),
        context_dim=8,
        groups=4,
    ),
    VAESpec(widths=(8, 8), resnets=1, groups=4),
    (TextSpec(width=8, layers=1, heads=2, mlp=16),),
    resolution=16,
)
LEVELS = {  # changes of the UNet's sizes: two levels, so that pictures change their size in it
    'widths': (8, 16),
    'down': ((0,), (1,)),
    'up': ((0, 0), (0, 0)),
    'heads': (2, 2),
}
SETTINGS = {  # of every run here, over configs/default.py
    'data.source': 'synthetic:40',
    'data.resolution': 16,
    'data.threads': 1,
    'data.crop': 'center',
    'lora.rank': 4,
    'lora.alpha': 8.0,
    'distill.w': '2:4',
    'train.batch': 8,
    'train.steps': 6,
    'train.lr': 1e-3,
    'train.log_every': 1,
    'train.save_every': 2,
    'preview.prompts': ('a red disc on green',),
    'preview.sampler': 'ddim',
    'preview.steps': 2,
    'preview.teacher_steps': 2,
}


def write_tiny(folder, **changes):
    """The tiny model, with changes of its UNet's sizes, as a diffusers folder -> its path."""
    unet = dataclasses.replace(MODEL.unet, **changes)
    write_model(folder, dataclasses.replace(MODEL, unet=unet), np.float32, keep=False)
    file = folder / 'unet' / 'config.json'  # latents are half the picture here, not an eighth
    file.write_text(json.dumps(json.loads(file.read_text()) | {'sample_size': 8}))
    return folder


def config(model, settings=()):
    """-> configs/default.py with SETTINGS, and `settings` over them."""
    return flags.read(CONFIGS / 'default.py', {'model': model} | SETTINGS | dict(settings))


class Recording:
    """A config that notes which of its keys are asked for; not those that are handed on as a whole."""

    def __init__(self, config, read, prefix=''):
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, key):
        return self[key]

    def __getitem__(self, key):
        value = self._config[key]
        if hasattr(value, 'to_dict'):
            return Recording(value, self._read, f'{self._prefix}{key}.')
        self._read.add(self._prefix + key)
        return value

    def items(self):
        return self._config.items()

    def to_dict(self):
        return self._config.to_dict()


def run(model, workdir, **settings):
    """A run in this process; settings have '__' for '.' -> what it exports."""
    settings = {key.replace('__', '.'): value for key, value in settings.items()}
    return train.run(config(model, settings), workdir)


def fill(model, workdir):
    """What a run does before its first step with data.cache: encode all samples."""
    settings = config(model, {'data.cache': True})
    feed.Feed(describe(str(model)), settings, sharding.make_mesh(), workdir).close()


def start(model, workdir, settings=(), devices=1, more=(), log=None, lost=None, folder=None):
    """Start a run in a process of its own -> Popen.

    log: the file for what it prints; lost: seconds until a silent process is given up; folder: where it
    is started.
    """
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
    }
    main = ['-c', PATIENCE.format(lost)] if lost else ['-m', 'lcm_jax.train']
    settings = {'model': model} | SETTINGS | dict(settings)
    command = [
        *(sys.executable, *main, f'--config={CONFIGS / "default.py"}', f'--workdir={workdir}'),
        *(f'--config.{key}={value}' for key, value in settings.items()),
        *more,
    ]
    log = Path(log or f'{workdir}.log')
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=folder or log.parent
        )
    process.log = log
    return process


def start_several(model, workdir, settings=(), processes=2, devices=4, lost=None, folders=None):
    """Start one run in several processes -> [Popen]. folders: where each is started."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return [
        start(
            model,
            workdir,
            settings,
            devices,
            (f'--coordinator=127.0.0.1:{port}', f'--processes={processes}', f'--process={i}'),
            f'{workdir}.{i}.log',
            lost,
            folders and folders[i],
        )
        for i in range(processes)
    ]


def finish(*processes, timeout=600, status=0):
    """Wait for all; each must end with this status -> what they printed."""
    try:
        for p in processes:
            p.wait(timeout)
    finally:
        for p in processes:
            p.poll() is None and p.kill()
    said = [p.log.read_text() for p in processes]
    codes = [p.returncode for p in processes]
    assert codes == [status] * len(codes), f'{codes}\n' + '\n'.join(s[-3000:] for s in said)
    return said


def until(condition, *processes, timeout=200):
    """Wait until the condition holds, or a process has ended -> whether it holds."""
    end = time.monotonic() + timeout
    while not condition():
        if any(p.poll() is not None for p in processes):
            return False
        assert time.monotonic() < end, [p.log.read_text()[-3000:] for p in processes]
        time.sleep(0.005)
    return True


def lines(workdir):
    """metrics.jsonl -> [dict]."""
    file = Path(workdir) / 'metrics.jsonl'
    text = file.read_text() if file.is_file() else ''
    return [json.loads(line) for line in text[: text.rfind('\n') + 1].splitlines()]


def losses(workdir):
    """-> {step: loss}; each step is there once."""
    rows = [(x['step'], x['loss']) for x in lines(workdir) if 'loss' in x]
    assert len(dict(rows)) == len(rows), f'a step twice: {[step for step, _ in rows]}'
    return dict(rows)


def checkpoints(workdir):
    """-> the steps whose checkpoints are complete by their names, and names of unfinished ones."""
    names = (
        os.listdir(Path(workdir) / 'checkpoints')
        if (Path(workdir) / 'checkpoints').is_dir()
        else []
    )
    return sorted(int(n) for n in names if n.isdigit()), [n for n in names if not n.isdigit()]


def state(workdir, step=None):
    """A checkpoint, by default the newest, read by orbax alone -> {path: array}."""
    step = checkpoints(workdir)[0][-1] if step is None else step
    folder = Path(workdir).resolve() / 'checkpoints' / str(step) / 'state'
    with ocp.PyTreeCheckpointer() as reader:
        there = reader.metadata(folder).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
        return dict(named(reader.restore(folder, restore_args=plain)))


def exported(workdir, name='lora'):
    return load_file(Path(workdir) / f'{name}.safetensors')


def same(a, b):
    """{name: array} twice: equal to the bit."""
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].tobytes() != b[k].tobytes()]
    assert not different, f'{len(different)} of {len(a)} differ, such as {different[:3]}'


def difference(a, b):
    """{name: number or array} twice -> the largest difference, relative to the largest of its array."""
    assert a.keys() == b.keys()
    return max(float(np.max(np.abs(a[k] - b[k])) / max(np.max(np.abs(a[k])), 1e-30)) for k in a)


def first_step(text):
    """What a run printed -> the step that it went on from last, or 0."""
    found = re.findall(r'going on from step (\d+)', text)
    return int(found[-1]) if found else 0


@contextlib.contextmanager
def other_weights(model, part):
    """A component's weights are others meanwhile, in a file of the same name."""
    (file,) = (model / part).glob('*.safetensors')
    kept = file.rename(file.with_suffix('.kept'))
    save_file({key: np.float32(1.01) * x for key, x in load_file(kept).items()}, file)
    try:
        yield
    finally:
        kept.replace(file)
