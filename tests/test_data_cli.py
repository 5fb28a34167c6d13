"""lcm-jax data check, and the arguments of lcm-jax data cache."""

import types

import numpy as np
import pytest
from PIL import Image
from sets import encoded, sample, tar_of

from lcm_jax.cli import main, parser
from lcm_jax.data_cli import settings
from lcm_jax.text import Tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))


def test_check_says_what_is_in_a_source(tmp_path, capsys):
    members = [m for i in range(8) for m in sample(f'{i}', size=(40, 20 + i), aesthetic=i / 2)]
    members += [*sample('7'), *sample('8', caption=''), *sample('9', caption='word ' * 99)]
    tar = tar_of(tmp_path / 'x.tar', members)
    sheet = tmp_path / 'deep' / 'sheet.png'
    options = ['--min-aesthetic', '1', '--max-dropped', '0.2', '--caption', 'txt', '--buckets']
    main(['data', 'check', f'wds:{tar}', *options, '--sheet', str(sheet)])
    out = capsys.readouterr().out
    for line in (
        f'wds:{tar}: 6 of 11 samples',
        'broken, by the index: 1 empty caption (first: x.tar/8)',
        '2 outside min_aesthetic = 1 (first: x.tar/0: 0)',
        '2 without what min_aesthetic needs (first: x.tar/7)',
        'keys that came before in the same file: 1; each is a sample',
        'pictures, height x width: from 22 x 40, median 24 x 40, to 27 x 40',
        'cut to 48 x 80: ',
        'captions: 4.0 tokens on average (start and end included), from 4 to 4; 0 of 6',
        'read 6 samples at ',
        f'wrote {sheet}',
    ):
        assert line in out
    assert Image.open(sheet).size[0] > 700
    main(['data', 'check', f'wds:{tar}', *options, '--model', 'emoji'])
    assert 'are longer than 32 and will be cut' in capsys.readouterr().out


def test_cache_says_what_it_leaves_out(tmp_path, capsys, monkeypatch):
    """With a stand-in for the model; so does the check of what it wrote."""

    def encode(batch):
        return {'mean': batch['pixels'][:, ::8, ::8].astype(np.float32)}

    model = types.SimpleNamespace(
        tokenizers=(Tokenizer.clip(),), encoders={}, marks=lambda parts: {}
    )
    monkeypatch.setattr('lcm_jax.model.describe', lambda name: model)
    monkeypatch.setattr('lcm_jax.encode.encoder', lambda *args: encode)
    members = [m for i in range(3) for m in sample(f'{i}', aesthetic=i)]
    members += sample('3', caption='word ' * 99, aesthetic=3)
    early = [('8.png', encoded(size=(40, 40))[:60]), *sample('8', aesthetic=9)[1:]]
    late = [*sample('9', caption=''), *sample('lost')]
    tar = tar_of(file := tmp_path / 'x.tar', [*members, *early, *late])
    content = file.read_bytes().rstrip(b'\0')
    file.write_bytes(content + bytes(-len(content) % 512))  # without the end mark
    options = ['--min-aesthetic', '1', '--max-dropped', '1']
    main(['data', 'cache', f'wds:{tar}', str(tmp_path / 'c'), *options])
    out = capsys.readouterr().out
    for line in (
        'broken, by the index: 1 empty caption (first: x.tar/9)',
        'left out by the filters: 1 outside min_aesthetic = 1 (first: x.tar/0: 0)',
        f'not read to its end: {tar}: no tar header and no end mark',
        'broken, when read: 1 picture cannot be read (first: x.tar/8: ',
        'captions cut: 1 longer than 77 tokens (first: x.tar/3)\n',
        'wrote 3 samples; ',
    ):
        assert line in out
    main(['data', 'check', f'cache:{tmp_path}/c'])
    out = capsys.readouterr().out
    assert 'broken, when it was encoded: 1 picture cannot be read\n' in out
    assert 'captions cut, when it was encoded: 1 longer than 77 tokens\n' in out


def test_check_reads_some_or_all(capsys):
    for limit, n in (('5', 5), ('0', 30), ('99', 30)):
        main(['data', 'check', 'synthetic:30', '--limit', limit])
        assert f'read {n} samples at ' in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path):
    tar = tar_of(tmp_path / 'x.tar', sample('1'))
    for arguments, said in (
        (['cache', 'synthetic:9', 'gs://b/c'], 'gs://b/c: caches are written by path'),
        (['check', 'synthetic:0'], 'error: synthetic:0: write synthetic:N'),
        (['check', 'synthetic:9', '--resolution', '13'], 'error: data.resolution = 13: must be a'),
        (['check', f'wds:{tar}', '--min-size', '64'], 'drop all 1: 1 outside min_size = 64'),
    ):
        with pytest.raises(SystemExit) as e:
            main(['data', *arguments])
        assert said in e.value.code and '\n' not in e.value.code


def test_options_are_the_settings():
    args = parser().parse_args(['data', 'cache', 'synthetic:9', 'out', '--flip', '--min-size', '9'])
    got = settings(args)
    assert got.source == 'synthetic:9' and got.flip and got.min_size == 9 and got.resolution == 64
    assert args.model == 'emoji' and args.processes == 1
