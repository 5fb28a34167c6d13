"""`lcm-jax`: what each verb writes; bad input ends with one line, a status and nothing written."""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lcm_jax import cli, train
from lcm_jax.errors import InputError
from lcm_jax.images import as_list

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # ml_collections' own
ROOT = Path(cli.__file__).parents[1]
CONFIG = str(ROOT / 'configs' / 'emoji_lcm_lora.py')


def verbs(parser):
    """-> the verbs of an ArgumentParser, and those below them: 'lora', 'lora inspect', ..."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from (name, *(f'{name} {verb}' for verb in verbs(below)))


VERBS = [*verbs(cli.parser())]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run(*arguments) in an empty folder -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            cli.main([str(a) for a in arguments])
            status = 0
        except SystemExit as e:
            # Python prints a message that is not a number to stderr and exits with 1.
            status = e.code if isinstance(e.code, int) else 1
            if status == 1:
                print(e.code, file=sys.stderr)
        return status, *capsys.readouterr()

    return run


def refused(result, said, folder=Path('.')):
    """One line that says `said`, status 1, no file."""
    status, out, err = result
    assert status == 1 and not out
    assert re.fullmatch(f'error: .*{said}.*\n', err), err
    assert not [*folder.iterdir()]


def test_help_names_every_verb_and_imports_little():
    command = [sys.executable, '-X', 'importtime', '-m', 'lcm_jax.cli', '--help']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert {'sample', 'lora check', 'data cache', 'plan'} < {*VERBS}
    for verb in VERBS:
        assert ' ' in verb or re.search(rf'^    {verb} ', done.stdout, re.M), verb
    imported = set(re.findall(r'\| +(\w[\w.]*)$', done.stderr, re.M))
    assert not imported & {'flax', 'orbax', 'orbax.checkpoint', 'transformers', 'optax'}


@pytest.mark.parametrize('verb', VERBS)
def test_every_verb_has_help(run, verb):
    status, out, _ = run(*verb.split(), '--help')
    assert status == 0 and f'usage: lcm-jax {verb}' in out


def test_sample(run, random_folder, lora_file):
    quick = ('--model', random_folder, '--steps', 1, '--sampler', 'ddim', '--guidance', 1)
    assert run('sample', 'red heart', *quick, '--out', 'new/one.png') == (
        0,
        'wrote new/one.png\n',
        '',
    )
    assert Image.open('new/one.png').size == (32, 32)
    assert [p.name for p in Path('new').iterdir()] == ['one.png']
    status, _, err = run(
        'sample',
        'red heart',
        *quick,
        '--out',
        'four.webp',
        '--count',
        4,
        '--lora',
        f'{lora_file}:0.5',
        '--negative',
        'sad',
        '--size',
        32,
        48,
        '--seed',
        5,
    )
    assert status == 0 and Image.open('four.webp').width > 4 * 48
    assert err == 'warning: the negative prompt has no effect at guidance 1; it acts above 1\n'


def test_sample_with_two_loras_of_one_name(run, random_folder, lora_file):
    """As diffusers calls all it saves."""
    loras = []
    for folder, scale in (('one', ':0.5'), ('two', '')):
        Path(folder).mkdir()
        file = shutil.copy(lora_file, f'{folder}/pytorch_lora_weights.safetensors')
        loras += ['--lora', file + scale]
    quick = ('--model', random_folder, '--steps', 1, '--sampler', 'ddim', '--guidance', 1)
    assert run('sample', 'red heart', *quick, *loras) == (0, 'wrote out.png\n', '')


def test_sample_from_a_picture(run, random_folder, tmp_path):
    image = Image.effect_noise((41, 33), 90).convert('RGB')
    image.save(tmp_path / 'in.png')
    Image.linear_gradient('L').save(tmp_path / 'mask.png')
    quick = ('--model', random_folder, '--steps', 2, '--sampler', 'ddim', '--guidance', 1)
    start = ('--image', 'in.png', '--mask', 'mask.png', '--strength', 0.5)
    command = ('sample', 'cat ' * 40, *quick, *start, '--truncate', '--clip-skip', 1)
    status, _, err = run(*command, '--out', 'new.png')
    assert status == 0 and Image.open('new.png').size == (40, 32)
    assert re.fullmatch('warning: prompt of 42 tokens cut to 32 .*\n', err)
    status, _, err = run('sample', 'red heart', *quick, '--image', 'absent.png')
    assert status == 1 and 'cannot read the picture absent.png' in err
    status, _, err = run('sample', 'red heart', *quick, '--strength', 0.5)
    assert status == 1 and 'strength = 0.5 without an image' in err


@pytest.mark.parametrize(
    ('picture', 'options', 'white', 'black'),
    [
        (Image.new('RGBA', (3, 2), (255, 0, 0, 0)), {}, 255, 0),
        (Image.new('LA', (3, 2), (90, 0)), {}, 255, 0),
        (Image.new('P', (3, 2)), {'transparency': 0}, 255, 0),
        (Image.new('I;16', (3, 2), 0x4000), {}, 0x40, 0x40),
        (Image.new('L', (3, 2), 90), {}, 90, 90),
    ],
)
def test_pictures_are_read_as_in_training(picture, options, white, black, tmp_path):
    """Upright, on a ground where they are transparent, 16 bits of grey not clipped; PIL images as files."""
    file, exif = tmp_path / 'in.png', Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    picture.save(file, exif=exif, **options)
    for ground, grey in ('white', white), ('black', black):  # as of a picture, as of a mask
        read = cli.read_picture(file, ground)
        assert read.size == (2, 3) and read.getcolors() == [(6, (grey,) * 3)]
        assert as_list(Image.open(file), 1, 'image', ground) == [read]


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'WEBP', 'GIF', 'BMP'])
def test_pictures_of_every_format_are_read(form, tmp_path):
    file = tmp_path / 'picture'  # whatever its name
    Image.new('RGB', (8, 4), 'white').save(file, form)
    assert cli.read_picture(file).getcolors() == [(32, (255, 255, 255))]


def test_what_is_no_picture_is_refused(tmp_path):
    file = tmp_path / 'in.png'
    for data in (b'', b'no picture', b'\x89PNG\r\n\x1a\n'):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r'cannot read the picture .*in\.png, as JPEG, PNG, '):
            cli.read_picture(file)
    with pytest.raises(InputError, match=r'cannot read the picture .*: Is a directory'):
        cli.read_picture(tmp_path)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (
            ['--sampler', 'ddmi'],
            r"unknown sampler 'ddmi' \(did you mean 'ddim'\?\); one of: ddim, dpm",
        ),
        (['--steps', 1000], 'steps = 1000; ddim takes a whole number from 1 to 999'),
        (['--steps', 60, '--sampler', 'lcm'], 'lcm takes a whole number from 1 to 50'),
        (['--lora', 'nope.safetensors'], "'nope.safetensors' is neither a shipped LoRA"),
        (['--lora', CONFIG], 'emoji_lcm_lora.py is not a readable safetensors file'),
        (
            ['--lora', 'LORA', '--lora', 'LORA'],
            r"LoRA '.*style.safetensors' is given twice; give the sum",
        ),
        (['--lora', 'lcm:half'], "'half' is no scale; write FILE:SCALE, a number"),
        (['--lora', 'lcm:nan'], "'nan' is no scale; write FILE:SCALE, a number"),
        (['--size', 30, 32], 'size 30 x 32: both must be multiples of 4'),
        (['--seed', -1], 'seed = -1'),
        (['--model', 'emojy'], "'emojy' is neither a shipped model .*did you mean 'emoji'"),
    ],
)
def test_sample_refuses(run, random_folder, lora_file, arguments, said):
    arguments = [lora_file if a == 'LORA' else a for a in arguments]
    refused(run('sample', 'red heart', '--model', random_folder, *arguments), said)


def test_sample_refuses_a_long_prompt(run, random_folder):
    said = 'prompt of 42 tokens .*this model takes at most 32: .cat'
    refused(run('sample', 'cat ' * 40, '--model', random_folder), said)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['sample', 'x', '--out', 'x.gif'], 'x.gif: the name must end in one of .png, .jpg'),
        (['sweep', 'x', '--lora', 'lcm', '--out', 'x'], 'x: the name must end in one of .png'),
        (['data', 'check', 'emoji', '--sheet', 'x'], 'x: the name must end in one of .png'),
        (['data', 'check', 'emoji', '--limit', -1], '-1: must be 0 or more'),
        (['data', 'cache', 'emoji', 'x', '--batch', 0], '0: must be 1 or more'),
        (['data', 'cache', 'emoji', 'x', '--processes', 0], '0: must be 1 or more'),
        (['measure', 'emoji', 'emoji', '--resolution', -1], '-1: must be 0 or more'),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(run, arguments, said):
    status, out, err = run(*arguments)
    assert status == 2 and not out and said in err and not list(Path().iterdir())


def test_data_refuses(run, tmp_path_factory):
    command = 'data', 'cache', 'emoji', 'x', '--process', 2, '--processes', 2
    refused(run(*command), '--process 2 of --processes 2: counted from 0')
    folder = tmp_path_factory.mktemp('pictures')
    refused(run('data', 'check', folder), f'{folder} is a folder: write folder:{folder}')


def test_bad_arguments_have_status_2(run):
    for arguments, said in (
        (['sample', 'x', '--steps', '0'], '--steps: 0: must be 1 or more'),
        (['sample', 'x', '--count', 'two'], "--count: invalid positive value: 'two'"),
        (['smaple', 'x'], "invalid choice: 'smaple'"),
        ([], 'required: VERB'),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and said in err.splitlines()[-1]


def test_a_folder_that_cannot_be_written(run, random_folder):
    Path('file').write_text('')
    status, _, err = run(
        'sample',
        'x',
        '--model',
        random_folder,
        '--steps',
        1,
        '--sampler',
        'ddim',
        '--guidance',
        1,
        '--out',
        'file/x.png',
    )
    assert status == 1 and re.fullmatch("error: .*'file'\n", err), err


def test_convert(run, random_folder):
    assert run('convert', random_folder, 'orbax')[0] == 0
    status, out, _ = run('convert', 'orbax', 'back', '--dtype', 'float16')
    assert status == 0 and re.fullmatch(
        r'wrote back: diffusers folder, [\d,]+ parameters in .*\n', out
    )
    status, _, err = run('convert', random_folder, 'back')
    assert (
        status == 1
        and err == f'error: back exists already or lies in {random_folder}; choose another name\n'
    )


def test_convert_refuses(run, random_folder):
    refused(run('convert', 'nope', 'out'), "'nope' is neither a shipped model")
    refused(
        run('convert', random_folder, 'out', '--dtype', 'half'),
        "unknown dtype 'half'; one of: keep",
    )


def test_lora(run, random_folder, lora_file):
    model = '--model', random_folder
    status, out, _ = run('lora', 'inspect', lora_file)
    assert status == 0 and 'rank        4' in out
    options = *model, '--dialect', 'peft'
    assert run('lora', 'convert', lora_file, 'x.safetensors', *options)[0] == 0
    assert 'dialect     peft' in run('lora', 'inspect', 'x.safetensors')[1]
    done = run('lora', 'check', lora_file, *model, '--target', 'comfyui')
    assert done == (0, f'comfyui loads 79 of 79 modules of {lora_file}\n', '')
    done = run('lora', 'check', 'x.safetensors', *model, '--target', 'a1111')
    assert done[0] == 1 and done[1].startswith('a1111 loads 0 of 79 modules')
    terms = f'{lora_file}:0.5', 'x.safetensors'
    assert run('lora', 'merge', *terms, 'sum.safetensors', *model)[0] == 0
    assert 'rank        8' in run('lora', 'inspect', 'sum.safetensors')[1]
    assert run('lora', 'merge', *terms, 'two.safetensors', *model, '--rank', 2)[0] == 0
    assert 'rank        2' in run('lora', 'inspect', 'two.safetensors')[1]


def test_lora_refuses(run, random_folder, lora_file):
    model = '--model', random_folder
    refused(
        run('lora', 'inspect', 'nope.safetensors'), "'nope.safetensors' is neither a shipped LoRA"
    )
    refused(run('lora', 'convert', lora_file, 'x.bin', *model), 'must end in .safetensors')
    said = "'half' is no scale; write FILE:SCALE, a number"
    refused(run('lora', 'merge', f'{lora_file}:half', 'x.safetensors', *model), said)
    said = 'differ in no layer that a LoRA can hold'
    options = 'x.safetensors', '--rank', 2
    refused(run('lora', 'extract', random_folder, random_folder, *options), said)


BAD_SETTINGS = [
    (
        'train.stepz=3',
        r"unknown config key 'stepz' \(did you mean 'steps'\?\); one of: accumulate, ",
    ),
    ('trian.steps=3', r"unknown config key 'trian' \(did you mean 'train'\?\); one of: data, "),
    ('train.steps=abc', "train.steps=abc: invalid literal for int.*'abc'"),
    ('train.steps.x=1', "unknown config key 'x'"),
    ('lora=7', '--config.lora=7: '),
]


@pytest.mark.parametrize(('setting', 'said'), BAD_SETTINGS)
def test_train_refuses_settings(run, setting, said):
    refused(run('train', '--config', CONFIG, '--workdir', 'w', f'--config.{setting}'), said)


def test_train_refuses(run, tmp_path_factory):
    refused(
        run('train', '--config', 'nope.py', '--workdir', 'w'), "No such file or directory: 'nope"
    )
    refused(
        run('train', '--config', CONFIG, '--workdir', 'w', '--config.model=emojy'),
        "'emojy' is neither",
    )
    other = ROOT / 'configs' / 'eval.py'
    said = "not a config of 'lcm-jax train': it has no 'train'; it is one of 'lcm-jax evaluate'"
    refused(run('train', '--config', other, '--workdir', 'w'), said)
    refused(run('train', '--config', CONFIG, '--workdir', ''), '--workdir is empty')
    said = '--workdir gs://bucket/w: must be a folder'
    refused(run('train', '--config', CONFIG, '--workdir', 'gs://bucket/w'), said)
    config = tmp_path_factory.mktemp('config') / 'typo.py'
    text = (
        Path(CONFIG)
        .read_text()
        .replace("Path(__file__).with_name('default.py')", repr(str(ROOT / 'configs/default.py')))
    )
    config.write_text(text.replace('c.train.steps', 'c.train.stepz'))
    refused(run('train', '--config', config, '--workdir', 'w'), 'Key "stepz" does not exist')


def test_the_two_ways_to_train_are_one(run, monkeypatch):
    got = []
    monkeypatch.setattr(
        train, 'run', lambda config, workdir: got.append((config.to_dict(), workdir))
    )
    arguments = [f'--config={CONFIG}', '--config.train.steps=7', '--workdir', 'w']
    arguments += ['--config.lora.rank=2', '--config.data.source=folder:a=b']
    run('train', *arguments)
    train.main(arguments)
    assert got[0] == got[1]
    assert got[0][0]['train']['steps'] == 7 and got[0][0]['data']['source'] == 'folder:a=b'


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ([f'--config={CONFIG}', '--workdir=w', 'extra'], 'unrecognized arguments: extra'),
        ([f'--config={CONFIG}', '--workdir=w', '--batch=3'], 'unrecognized arguments: --batch=3'),
        ([f'--config={CONFIG}', '--workdir=w', '--config.model'], 'arguments: --config.model'),
        ([f'--config={CONFIG}'], 'required: --workdir'),
        (['--workdir=w'], 'required: --config'),
    ],
)
def test_command_lines_that_are_none(run, arguments, said, capsys):
    """Of the verb and of the module; a verb without a config takes no key of one."""
    with pytest.raises(SystemExit, match='2'):
        train.main(arguments)
    assert said in capsys.readouterr().err
    status, _, err = run('train', *arguments)
    assert status == 2 and said in err
    status, _, err = run('demo', '--config.train.steps=3')
    assert status == 2 and 'unrecognized arguments: --config.train.steps=3' in err


def test_the_module_as_a_program(tmp_path):
    """One real process each: the last line on stderr, the status, no traceback."""
    for arguments, said in (
        (
            ['-m', 'lcm_jax.train', f'--config={CONFIG}', '--workdir=w', '--config.train.stepz=3'],
            'stepz',
        ),
        ([str(ROOT / 'tools/convert_weights.py'), 'nope', 'out'], 'neither a shipped model'),
    ):
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith('error: ') and said in done.stderr
        assert done.stderr.count('\n') == 1
    assert not [*tmp_path.iterdir()]
