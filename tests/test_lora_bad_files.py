"""Bad LoRA files: one line that names the file, and nothing read or written."""

import re

import jax
import numpy as np
import pytest
from test_lora import adapter
from test_lora_files import CONV, MODEL, TO_Q, draw, to_path, write

from lcm_jax.errors import InputError
from lcm_jax.lora_files import files
from lcm_jax.lora_files.files import read_lora
from lcm_jax.models.shapes import unet_shapes
from lcm_jax.models.zoo import MODELS
from lcm_jax.tensors import read_tensors, write_tensors


def edited(tmp_path, edit, dialect='kohya'):
    """A good file after `edit(tensors, metadata)`."""
    write(tmp_path / 'good.safetensors', dialect=dialect)
    tensors, metadata = read_tensors(tmp_path / 'good.safetensors')
    edit(tensors, metadata)
    write_tensors(tmp_path / 'bad.safetensors', tensors, metadata)
    return tmp_path / 'bad.safetensors'


def refused(file, message, models=MODEL):
    with pytest.raises(InputError) as e:
        read_lora(file, models)
    said = str(e.value)
    assert '\n' not in said and file.name in said and re.search(message, said), said


def rename(old, new):
    def edit(tensors, metadata):
        tensors[new] = tensors.pop(old)

    return edit


def change(key, fn):
    def edit(tensors, metadata):
        tensors[key] = np.asarray(fn(tensors[key]))

    return edit


def both(*edits):
    def edit(tensors, metadata):
        for e in edits:
            e(tensors, metadata)

    return edit


MISFIT = r'1 of 79 modules do not fit the weight \(mid_block\.\S+ has \(.*\) for \(.*\)\)'
NAN = 'holds values that are not finite'


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda tensors, _: tensors.clear(), 'holds no tensors'),
        (
            lambda tensors, _: tensors.pop(f'{CONV}.lora_up.weight'),
            r'1 of 79 modules are incomplete \(mid_block\.resnets\.0\.conv1 has down without up\)',
        ),
        (
            both(
                lambda tensors, _: tensors.pop(f'{CONV}.lora_down.weight'),
                lambda tensors, _: tensors.pop(f'{TO_Q}.lora_down.weight'),
            ),
            r'2 of 79 modules are incomplete \(\S+ has up without down, \S+ has up without down\)',
        ),
        (lambda tensors, _: tensors.update({f'{TO_Q}.lokr_w1': draw(2, 2)}), 'are incomplete'),
        (
            rename(f'{TO_Q}.lora_up.weight', TO_Q.replace('to_q', 'to_qq') + '.lora_up.weight'),
            r'1 of \d+ tensors belong to no module .*kohya, kohya-sgm, peft.*'
            rf"did you mean '{TO_Q}\.lora_up\.weight'.*nothing was loaded$",
        ),
        (
            rename(
                f'{TO_Q}.lora_up.weight',
                'lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight',
            ),
            'belong to no module .*nothing was loaded',
        ),
        (
            lambda tensors, _: tensors.update(
                {'unet.' + to_path(TO_Q).replace('/', '.') + '.lora_A.weight': draw(4, 16)}
            ),
            rf'1 of \d+ tensors are given twice \({TO_Q}\.lora_down\.weight and unet\.mid',
        ),
        (change(f'{CONV}.lora_down.weight', lambda x: x[:, :5]), MISFIT),
        (change(f'{CONV}.lora_down.weight', lambda x: x[:2]), MISFIT),
        (change(f'{CONV}.lora_down.weight', lambda x: x[:0]), MISFIT),
        (
            both(
                change(f'{CONV}.lora_down.weight', lambda x: x[:0]),
                change(f'{CONV}.lora_up.weight', lambda x: x[:, :0]),
            ),
            MISFIT,
        ),
        (change(f'{CONV}.lora_down.weight', lambda x: x.reshape(4, 9, 4, 4)), MISFIT),
        (change(f'{CONV}.lora_down.weight', lambda x: x.ravel()), MISFIT),
        (change(f'{CONV}.lora_down.weight', lambda x: x[0, 0, 0, 0]), MISFIT),
        (change(f'{CONV}.lora_up.weight', lambda x: np.tile(x, (1, 1, 3, 3))), MISFIT),
        (change(f'{TO_Q}.lora_up.weight', lambda x: x[None]), MISFIT),
        (
            change(f'{TO_Q}.alpha', lambda x: np.ones(3, np.float16)),
            r'modules have an alpha that is not one number \(\S+to_q of shape \(3,\)\)',
        ),
        (change(f'{TO_Q}.alpha', lambda x: np.nan), rf'bad\.safetensors: {TO_Q}\.alpha {NAN}'),
        (change(f'{TO_Q}.lora_up.weight', lambda x: x * np.nan), rf'{TO_Q}\.lora_up\.weight {NAN}'),
        (change(f'{TO_Q}.lora_down.weight', lambda x: x * np.inf), NAN),
        *(
            (
                rename(f'{TO_Q}.lora_up.weight', f'{stem}.{leaf}'),
                rf'holds {method} \(1 tensors such as .*not supported .*; nothing was loaded',
            )
            for stem, leaf, method in (
                (TO_Q, 'dora_scale', 'DoRA'),
                (TO_Q, 'lora_magnitude_vector', 'DoRA'),
                (TO_Q, 'oft_blocks', 'OFT'),
                (TO_Q, 'diff', 'full differences'),
                ('bundle_emb.cat', 'string_to_param', 'textual inversion'),
                ('model.diffusion_model.time_embed', '0.weight', 'a whole model'),
                ('unet.mid_block.attentions.0', 'hada_w1_a.default', 'LoHa'),
            )
        ),
    ],
)
def test_bad_files(tmp_path, edit, message):
    refused(edited(tmp_path, edit), message)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ('not JSON', 'lora_adapter_metadata is not a peft config in JSON'),
        ('[1]', 'its peft config is a list'),
        ('{"unet.lora_alpha": "four"}', 'lora_alpha in its peft config is not a finite number'),
        ('{"unet.alpha_pattern": [3]}', 'is not a finite number'),
        ('{"unet.alpha_pattern": {"to_q": "x"}}', 'is not a finite number'),
        ('{"unet.alpha_pattern": {"to_q[": 2}}', 'alpha_pattern .*to_q'),
        ('{"unet.use_dora": true}', 'DoRA in its peft config is not supported'),
        ('{"unet.init_lora_weights": "pissa_niter_4"}', 'pissa_niter_4 .* is not supported'),
        ('{"unet.lora_alpha": NaN}', 'not a finite number'),
    ],
)
def test_bad_peft_metadata(tmp_path, value, message):
    def edit(_, metadata):
        metadata.update(lora_adapter_metadata=value)

    refused(edited(tmp_path, edit, 'peft'), message)


@pytest.mark.parametrize('keep', [0, 7, 100, 0.5, -1])
def test_truncated_files(tmp_path, keep):
    file = edited(tmp_path, lambda *_: None)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))] if isinstance(keep, float) else whole[:keep])
    refused(file, 'is not a readable safetensors file')


def test_a_missing_file(tmp_path):
    refused(tmp_path / 'nowhere.safetensors', 'no such file')


@pytest.mark.parametrize('model', ['sd15', 'sdxl'])
def test_a_lora_for_another_base(tmp_path, model):
    refused(
        edited(tmp_path, lambda *_: None),
        r'\d+ of 79 modules do not fit the weight|belong to no module',
        {'unet': unet_shapes(MODELS[model].unet)},
    )


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'alpha': 0}, 'LoRA alpha = 0; float16 files take a positive number'),
        ({'alpha': -4}, 'LoRA alpha = -4'),
        ({'alpha': 1e6}, 'LoRA alpha = 1000000'),
        (
            {'dialect': 'kohia'},
            r"unknown LoRA dialect to write 'kohia' \(did you mean 'kohya'\?\)",
        ),
        (
            {'alpha': 1e-5},
            r'lora\.safetensors in float16: 79 of 237 tensors hold values that',
        ),
    ],
)
def test_what_cannot_be_written_is_not(tmp_path, kwargs, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / 'lora.safetensors', **kwargs)
    assert not list(tmp_path.iterdir())


def test_a_diverged_adapter_is_not_written(tmp_path):
    broken = jax.tree.map(lambda x: x * np.nan, adapter())
    with pytest.raises(InputError, match='158 of 237 tensors hold values that are not finite'):
        write(tmp_path / 'lora.safetensors', broken)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('damage', ['scaled', 'lost'])
def test_a_file_that_reads_back_otherwise_is_not_left_behind(tmp_path, monkeypatch, damage):
    """As by a disk, or by a reader and a writer that do not agree."""
    real = files.write_tensors

    def disk(file, tensors, metadata):
        if damage == 'lost':
            tensors = {k: x for k, x in tensors.items() if not k.startswith(TO_Q)}
        else:
            tensors = tensors | {f'{TO_Q}.lora_up.weight': tensors[f'{TO_Q}.lora_up.weight'] * 1.01}
        real(file, tensors, metadata)

    monkeypatch.setattr(files, 'write_tensors', disk)
    with pytest.raises(InputError, match=r'lora\.safetensors: .* read back'):
        write(tmp_path / 'lora.safetensors')
    assert not list(tmp_path.iterdir())
