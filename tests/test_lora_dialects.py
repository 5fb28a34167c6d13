"""Every dialect of LoRA files, for every model at full size: all modules are read.

`pytest tests/test_lora_dialects.py -s` prints the table of modules read / modules in the file.
"""

import types

import lora_dialects
import numpy as np
import pytest
from lora_dialects import DIALECTS, adapted, full_size, undone

from lcm_jax.errors import InputError
from lcm_jax.lora_files.family import family
from lcm_jax.lora_files.files import locate, modules, place
from lcm_jax.lora_files.programs import dropped
from lcm_jax.models.zoo import MODELS

FAMILY = {'sd15': 'SD 1.x', 'sd21': 'SD 2.x', 'sdxl': 'SDXL', 'ssd1b': 'SSD-1B'}
UNKNOWN_TO_DIFFUSERS = {
    **dict.fromkeys(('sd15', 'sd21'), ('peft-raw', 'kohya-sgm')),
    **dict.fromkeys(('sdxl', 'ssd1b'), ('peft-raw',)),
}
LEVELS = types.SimpleNamespace(layers_per_block=2)  # what diffusers' converter reads of the config


@pytest.mark.parametrize('model', MODELS)
def test_every_dialect_is_read_whole(model):
    models = full_size(model)
    peft = lora_dialects.peft(models, rank=1, dtype=np.float16)
    spots = list(adapted(models))
    print(f'\n| {model} |', end='')
    for dialect, spell in DIALECTS.items():
        file = spell(peft)
        if dialect not in UNKNOWN_TO_DIFFUSERS[model]:
            assert undone(file, LEVELS).keys() == peft.keys(), dialect
        read = place(file, {}, models, 'file')
        assert sum(map(len, read.values())) == len(spots)
        for component, path, module, _ in spots:
            a, b = (peft[f'{component}.{module}.lora_{x}.weight'] for x in 'AB')
            ab = read[component][path]
            np.testing.assert_array_equal(
                ab['down'], a.T if a.ndim == 2 else a.transpose(2, 3, 1, 0)
            )
            np.testing.assert_array_equal(ab['up'].ravel(), b.ravel())
        assert family(file) == FAMILY[model]
        print(f' {dialect} {sum(map(len, read.values()))} / {len(spots)} |', end='')


@pytest.mark.parametrize('model', ['sd15', 'sdxl'])
def test_text_encoders_without_their_first_name(model):
    """transformers 5 names the modules of CLIPTextModel without `text_model.`."""
    models = full_size(model)
    peft = lora_dialects.peft(models, rank=1, dtype=np.float16)
    peft = {key.replace('text_model.', ''): x for key, x in peft.items()}
    for dialect, spell in DIALECTS.items():
        read = place(spell(peft), {}, models, dialect)
        assert sum(map(len, read.values())) == len(peft) // 2, dialect


@pytest.mark.parametrize(
    ('dialect', 'model', 'program', 'lost'),
    [
        *((d, m, 'diffusers', 0) for d in ('kohya', 'peft') for m in MODELS),
        *(('kohya-sgm', m, 'diffusers', 0) for m in ('sdxl', 'ssd1b')),
        *(('kohya', m, 'comfyui', 0) for m in MODELS),
        *(('kohya-sgm', m, p, 0) for m in ('sdxl', 'ssd1b') for p in ('comfyui', 'a1111')),
        ('kohya', 'sd15', 'a1111', 0),
        ('kohya', 'sdxl', 'a1111', ['unet up_blocks.0.upsamplers.0.conv']),
        ('kohya', 'ssd1b', 'a1111', ['unet up_blocks.0.upsamplers.0.conv']),
        ('peft', 'sdxl', 'comfyui', 560),
        ('peft', 'sdxl', 'a1111', 788 + 72 + 192),
        ('mixed', 'sdxl', 'comfyui', 560),
        ('mixed', 'sdxl', 'diffusers', 560),
    ],
)
def test_what_other_programs_drop(dialect, model, program, lost):
    models = full_size(model)
    spots = {component: modules(params) for component, params in models.items()}
    found = locate(DIALECTS[dialect](lora_dialects.peft(models)), spots, 'file')
    drops = dropped(program, found, spots)
    assert (drops if isinstance(lost, list) else len(drops)) == lost


@pytest.mark.parametrize('model', ['sdxl', 'ssd1b'])
def test_what_diffusers_misnames_is_dropped(model):
    """Of every module with a kernel, not only those that are usually adapted."""
    models = {'unet': full_size(model)['unet']}
    spots = {part: modules(params) for part, params in models.items()}
    theirs = {f'unet.{module}' for module in spots['unet']}
    for dialect, lost in (('kohya', 2), ('kohya-sgm', 0)):
        file = DIALECTS[dialect](lora_dialects.peft(models, targets={'unet': '.*'}))
        drops = dropped('diffusers', locate(file, spots, 'file'), spots)
        read = {key.split('.lora')[0] for key in undone(file, LEVELS)}
        assert len(theirs - read) == len(drops) == lost
        assert {name.replace('unet ', 'unet.') for name in drops} == theirs - read


def test_diffusers_loads_nothing_of_a_kohya_file_with_a_strange_tensor():
    models = {'unet': full_size('sd15')['unet']}
    file = DIALECTS['kohya'](lora_dialects.peft(models))
    module = next(key for key in file if 'conv1.lora_down' in key).split('.')[0]
    file[f'{module}.lora_mid.weight'] = np.ones((1, 1, 3, 3), np.float32)
    with pytest.raises(ValueError, match='not been correctly renamed'):
        undone(file, LEVELS)
    spots = {part: modules(params) for part, params in models.items()}
    found = locate(file, spots, 'file')
    assert len(dropped('diffusers', found, spots)) == len(found)
    assert not dropped('comfyui', found, spots)


@pytest.mark.parametrize('dialect', DIALECTS)
@pytest.mark.parametrize(
    ('mine', 'model'),
    [('sdxl', 'sd15'), ('sd15', 'sdxl'), ('sdxl', 'ssd1b'), ('ssd1b', 'sdxl'), ('sd15', 'sd21')],
)
def test_a_lora_for_another_base_is_refused(dialect, mine, model):
    file = DIALECTS[dialect](lora_dialects.peft({'unet': full_size(mine)['unet']}))
    with pytest.raises(InputError) as e:
        place(file, {}, full_size(model), 'my.safetensors')
    said = str(e.value)
    assert said.startswith('my.safetensors: ') and '\n' not in said and len(said) < 1200
    assert f'it looks like a LoRA for {FAMILY[mine]}; nothing was loaded' in said


@pytest.mark.parametrize('method', ['lora', 'lokr'])
def test_the_family_of_self_attention_alone(method):
    """It reads no text, whose width tells the others."""
    leaves = {'lora': ('lora_down.weight', 'lora_up.weight'), 'lokr': ('lokr_w1', 'lokr_w2')}[
        method
    ]
    for model, name in {**FAMILY, 'sd15': 'unknown', 'sd21': 'unknown'}.items():
        modules = [m for *_, m, _ in adapted({'unet': full_size(model)['unet']}) if '.attn1.' in m]
        stems = ['lora_unet_' + module.replace('.', '_') for module in modules]
        keys = [f'{stem}.{leaf}' for stem in stems for leaf in leaves]
        assert family(dict.fromkeys(keys, np.ones((1, 1)))) == name
