"""Full-size models from form to form: `pytest -m full -s` (30 GB of disk, 12 GB of memory, minutes)."""

import filecmp
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import write_model

from lcm_jax.checkpoint import open_model
from lcm_jax.convert import FORMS
from lcm_jax.models import shapes
from lcm_jax.models.unet import UNet
from lcm_jax.models.zoo import MODELS
from lcm_jax.tree import count

pytestmark = pytest.mark.full

SINGLE = 'model.safetensors'
CONVERT = """
import re, sys, time
from lcm_jax.cli import main
start = time.perf_counter()
main(['convert', *sys.argv[1:]])
status = open('/proc/self/status').read()
print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) * 1024, time.perf_counter() - start)
"""


def size(path):
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in [path, *path.rglob('*')] if p.is_file())


def convert(source, out, limit=1.3):
    """Convert in a process of its own; its peak memory is at most `limit` times the larger file."""
    form = out.name if out.name in FORMS else 'original'
    command = [sys.executable, '-c', CONVERT, str(source), str(out), '--to', form]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = map(float, done.stdout.splitlines()[-1].split())
    larger = max(size(source), size(out))
    print(
        f'\n{source.name} -> {out.name}: {larger / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB '
        f'({peak / larger:.2f} of it), {seconds:.0f} s'
    )
    assert peak <= limit * larger
    return out


def remove(path):
    for p in sorted(path.rglob('*'), reverse=True):
        p.unlink() if p.is_file() else p.rmdir()
    path.unlink() if path.is_file() else path.rmdir()


def same_files(a, b):
    names = {p.relative_to(a) for p in a.rglob('*') if p.is_file()}
    assert names == {p.relative_to(b) for p in b.rglob('*') if p.is_file()}
    assert [n for n in names if not filecmp.cmp(a / n, b / n, shallow=False)] == []


def round_trip(folder, *forms):
    """A folder through forms and back -> the folder that comes back, the same to the last byte."""
    last = folder
    for i, form in enumerate(forms):
        new = convert(last, folder.parent / str(i) / form)
        if last != folder:
            remove(last)
        last = new
    same_files(folder, last)
    return last


def test_stable_diffusion_15(tmp_path):
    """Byte-exact through the single file and orbax, and the UNet's output is diffusers' at 512 px."""
    import torch
    from diffusers import UNet2DConditionModel

    spec = MODELS['sd15']
    write_model(tmp_path / 'diffusers', spec, np.float32, keep=False)
    back = round_trip(tmp_path / 'diffusers', 'orbax', SINGLE, 'orbax', 'diffusers')
    rng = np.random.default_rng(0)
    z, context = (rng.normal(size=s).astype(np.float32) for s in ((1, 64, 64, 4), (1, 77, 768)))
    params = open_model(back).load('unet')
    ours = jax.jit(UNet(spec.unet).apply)({'params': params}, z, jnp.array([501.0]), context)
    ours = np.asarray(ours)
    del params
    with torch.no_grad():
        theirs = UNet2DConditionModel.from_pretrained(back / 'unet')(
            torch.tensor(z).movedim(-1, 1), 501, torch.tensor(context)
        ).sample
    theirs = theirs.movedim(1, -1).numpy()
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f'\nlargest difference from diffusers {error:.1e} of the largest output')
    assert error < 1e-4


@pytest.mark.parametrize('name', ['sdxl', 'ssd1b'])
def test_xl(name, tmp_path):
    spec = MODELS[name]
    write_model(tmp_path / 'diffusers', spec, np.float16, keep=False)
    assert count(open_model(tmp_path / 'diffusers').shapes('unet')) == count(
        shapes.unet_shapes(spec.unet)
    )
    back = round_trip(tmp_path / 'diffusers', SINGLE, 'orbax', 'diffusers')
    remove(back)
