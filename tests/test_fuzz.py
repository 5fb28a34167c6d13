"""Damaged files: each opens as what it holds, or raises one InputError; never anything else.

A kind of file is a row of KINDS: how to make a good one, and how to load it. A load returns what the
file holds by the file's own keys, so that it can be compared with the reference reader's.
"""

import json
import random
import warnings
from typing import NamedTuple

import lora_dialects
import numpy as np
import pytest
import safetensors
import torch
from random_model import write_model
from safetensors.numpy import load_file

from lcm_jax import lora, single
from lcm_jax.checkpoint import open_folder, open_model
from lcm_jax.convert import convert
from lcm_jax.errors import InputError
from lcm_jax.lora_files.files import read_lora
from lcm_jax.models.clip import TextSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec
from lcm_jax.models.zoo import ModelSpec
from lcm_jax.tensors import read_tensors, write_tensors
from lcm_jax.tree import named

SPEC = ModelSpec(
    UNetSpec(widths=(32,), down=((1,),), mid=1, up=((1, 0),), heads=(8,), context_dim=64),
    VAESpec(widths=(32,), resnets=1),
    (TextSpec(width=64, layers=1, heads=1, mlp=32, vocab=9),),
    64,
)
WEIGHTS = 'vae/diffusion_pytorch_model.safetensors'


# --- damage to bytes, to a safetensors header, to the tensors


def some_bytes(data, rng):
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(len(data), rng.choice((9, 400, 10**9))))
        data[at] = rng.randrange(256)


def cut(data, rng):
    del data[rng.randrange(len(data)) :]


def longer(data, rng):
    data += bytes(rng.randrange(1, 9))


def hole(data, rng):
    at = rng.randrange(len(data))
    data[at : at + 40] = bytes(len(data[at : at + 40]))


def letter(data, rng):
    """One letter or digit of a text for another."""
    letters = [i for i, x in enumerate(data) if chr(x).isalnum()]
    digits = [i for i in letters if chr(data[i]).isdigit()]
    at = rng.choice(rng.choice((letters, digits or letters)))
    data[at] = rng.choice(b'0123456789' if at in digits else b'abcdefgh')


def header(edit):
    """Damage that edits the header, a dict of keys, and leaves the bytes of the tensors."""

    def damage(data, rng):
        size = int.from_bytes(data[:8], 'little')
        entries = json.loads(data[8 : 8 + size])
        key = rng.choice([k for k in entries if k != '__metadata__'])
        edit(entries, key, rng)
        text = json.dumps(entries).encode()
        text += b' ' * (-len(text) % 8)
        data[: 8 + size] = len(text).to_bytes(8, 'little') + text

    return damage


def renamed(entries, key, rng):
    new = rng.choice((key[:-1], key + 'x', key.replace('weight', 'bias'), '', 'x' * 999, '\n'))
    entries[new] = entries.pop(key)


def swapped(entries, key, rng):
    other = rng.choice([k for k in entries if k != '__metadata__'])
    entries[key], entries[other] = entries[other], entries[key]


def reshaped(entries, key, rng):
    shape = entries[key]['shape']
    entries[key]['shape'] = rng.choice(
        (
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[:-1],
            [2**62, 4],
            [-1, *shape],
            ['3'],
            'x',
            {},
        )
    )


def retyped(entries, key, rng):
    kinds = ('F16', 'BF16', 'I16', 'F32', 'F64', 'F8_E4M3', 'BOOL', 'F4', 'X', None, 3)
    entries[key]['dtype'] = rng.choice(kinds)


def moved(entries, key, rng):
    start, end = entries[key]['data_offsets']
    entries[key]['data_offsets'] = rng.choice(
        ([start, end + 2], [end, start], [0, end - start], [-2, end], [start], [2**63, 2**63 + 2])
    )


def odd(entries, key, rng):
    entries[rng.choice((key, '__metadata__'))] = rng.choice((None, 3, [], {}, {'a': 3}, 'x'))


def told(entries, key, rng):
    """Metadata of ours that is not what we would write."""
    said = entries.setdefault('__metadata__', {})
    text = said.get(single.MODEL, '{}')
    at = rng.randrange(len(text))
    said[single.MODEL] = rng.choice((text[:at], '[]', '{}', '3', text[:at] + '0' + text[at + 1 :]))


ANY = (some_bytes, cut, longer, hole)
TENSORS = (
    *ANY,
    header(renamed),
    header(lambda entries, key, rng: entries.pop(key)),
    header(swapped),
    header(reshaped),
    header(retyped),
    header(moved),
    header(odd),
)


# --- what is damaged


class Kind(NamedTuple):
    """A kind of file."""

    make: callable  # folder of the model, new folder -> a good file
    load: callable  # the file -> {its key: array}; raises InputError
    damages: tuple  # (bytearray, random.Random) -> changes the former
    reference: callable  # the file -> {its key: array} as the format's own library reads it
    cases: int


def folder_of(file):
    return open_folder(file.parents[1])


def vae(file):
    ckpt = folder_of(file)
    ckpt.load('vae')
    return {key: np.asarray(x) for key, x in ckpt.tensors('vae').items()}


def whole(file):
    """All components, under the names of the file."""
    ckpt, out = open_model(file), {}
    layout = single.LAYOUTS[single.SD1]
    for part in ckpt.configs:
        out |= single.to_original(layout[part], ckpt.tensors(part))
    return {key: np.asarray(x) for key, x in out.items()}


def component(folder, new):
    for name in ('config.json', 'diffusion_pytorch_model.safetensors'):
        (new / 'vae').mkdir(parents=True, exist_ok=True)
        (new / 'vae' / name).write_bytes((folder / 'vae' / name).read_bytes())
    return new / WEIGHTS


def config(folder, new):
    return component(folder, new).with_name('config.json')


def index(folder, new):
    file = component(folder, new)
    found = load_file(file)
    name = 'x-00001-of-00001.safetensors'
    file.rename(file.with_name(name))
    file = file.with_name(file.name + '.index.json')
    file.write_text(json.dumps({'weight_map': dict.fromkeys(found, name)}))
    return file


def told_file(folder, new):
    convert(folder, new / 'x.safetensors')
    return new / 'x.safetensors'


def bare_file(folder, new):
    file = told_file(folder, new)
    write_tensors(file, read_tensors(file)[0])
    return file


def pickle(folder, new):
    file = component(folder, new)
    found = {key: torch.tensor(x) for key, x in load_file(file).items()}
    file.unlink()
    torch.save(found, file.with_suffix('.bin'))
    return file.with_suffix('.bin')


def sibling(file):
    return load_file(next(file.parent.glob('*.safetensors')))


def unpickled(file):
    return {
        key: x.numpy().copy() for key, x in torch.load(file, weights_only=True, mmap=True).items()
    }


def lora_kind(dialect):
    """A LoRA file in a dialect, for the UNet and the text encoder."""

    def models(file):
        ckpt = open_folder(file.parent / 'model')
        return {part: ckpt.shapes(part) for part in ('unet', 'text_encoder')}

    def make(folder, new):
        (new / 'model').symlink_to(folder)
        file = new / 'lora.safetensors'
        found = lora_dialects.DIALECTS[dialect](lora_dialects.peft(models(file), rank=2))
        write_tensors(file, found, {'ss_network_dim': '2'})
        return file

    def load(file):
        """Nothing to compare by key, but each update fits its module and is finite."""
        adapters, _ = read_lora(file, of := models(file))
        for part, adapter in adapters.items():
            shapes = dict(named(of[part]))
            for path, ab in adapter.items():
                delta = np.asarray(lora.delta(ab))
                assert delta.shape == shapes[path].shape and np.isfinite(delta).all()
        return {}

    return Kind(make, load, TENSORS, load_file, 44)


KINDS = {
    'weights': Kind(component, vae, TENSORS, load_file, 200),
    'config.json': Kind(config, vae, (*ANY, letter), sibling, 60),
    'index of shards': Kind(index, vae, (*ANY, letter), sibling, 60),
    'single file': Kind(bare_file, whole, TENSORS, load_file, 160),
    'single file of ours': Kind(told_file, whole, (*TENSORS, header(told)), load_file, 100),
    'pickle': Kind(pickle, vae, ANY, unpickled, 60),
} | {f'LoRA, {dialect}': lora_kind(dialect) for dialect in lora_dialects.DIALECTS}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz') / 'model'
    write_model(folder, SPEC, keep=False)
    return folder


@pytest.mark.parametrize('name', KINDS)
def test_damaged_files(name, folder, tmp_path):
    make, load, damages, reference, cases = KINDS[name]
    file = make(folder, tmp_path)
    good, whole = reference(file), file.read_bytes()
    assert load(file).keys() in (good.keys(), set())
    outcomes = {'loaded': 0, 'refused': 0}
    for seed in range(cases):
        rng, data = random.Random(f'{name} {seed}'), bytearray(whole)
        damage = damages[seed % len(damages)]
        damage(data, rng)
        file.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                found = load(file)
            except InputError as e:
                outcomes['refused'] += 1
                assert str(tmp_path) in str(e), (seed, damage, e)
                continue
            except Exception as e:
                raise AssertionError(f'case {seed} ({damage}) raised {e!r}') from e
            try:
                expected = reference(file)
            except (safetensors.SafetensorError, TypeError, KeyError) as e:
                raise AssertionError(f'case {seed} ({damage}): {e!r} in the reference') from e
        outcomes['loaded'] += 1
        assert found.keys() <= expected.keys()
        for key, x in found.items():
            assert np.isfinite(x.astype(np.float32)).all(), (seed, key)
            assert x.tobytes() == expected[key].tobytes(), (seed, damage, key)
    print(f'\n{name}: {outcomes}')
    assert outcomes['refused'] > cases / 10
