"""The evaluation harness, on a tiny model: what it draws, measures, keeps and refuses."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import runs
from PIL import Image

from lcm_jax import artist, cells, evaluate, judge, measure, metrics, report
from lcm_jax.cli import main
from lcm_jax.data.pairs import pairs, picked, spread
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError
from lcm_jax.flags import read
from lcm_jax.metrics import Statistics
from lcm_jax.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures('quick_compiler')


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))


def config(model, count=24, **changes):
    settings = {'resolution': 16, 'paired': 9, 'batch': 8} | changes
    c = read(runs.CONFIGS / 'eval.py', settings)
    c.model, c.real, c.reference = str(model), 'emoji-heldout:noto', 'teacher'
    c.ways = (
        {'label': 'few', 'sampler': 'ddim', 'steps': (1, 2), 'guidance': (1.0, 3.0)},
        {'label': 'teacher', 'sampler': 'ddim', 'steps': 3, 'guidance': 3.0},
    )
    c.sets = (('some', 'emoji-heldout:noto', count),)
    c.prompts = ('a cat', 'a dog')
    return c


@pytest.fixture(scope='module')
def done(model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('eval')
    return workdir, evaluate.run(config(model), workdir)


def test_rows_are_every_combination_with_the_reference_first(done):
    _, found = done
    rows = found['sets'][0]['rows']
    assert [(r['label'], r['steps']) for r in rows] == [
        ('real pictures', None),
        ('teacher', 3),
        *((f'few, guidance {g}', n) for g in (1, 3) for n in (1, 2)),
    ]
    assert all(r['n'] == 24 for r in rows)
    assert rows[1]['fid'] > rows[0]['fid']
    assert 'psnr' not in rows[1] and all('psnr' in r and 'lpips' in r for r in rows[2:])
    assert all(r['biased'] for r in rows)


def test_numbers_are_those_of_the_pictures(model, done, tmp_path):
    """Drawn at once, and measured whole, without the harness's batches and streams."""
    c, row = config(model), done[1]['sets'][0]['rows'][-1]
    source = open_source(
        'emoji-heldout:noto', settings := DataSettings(resolution=16, crop='center')
    )
    ids = picked(source, 24, c.seed)
    captions = [caption for _, _, caption in pairs(source, settings, ids)]
    pipe = Pipeline.load(model)
    drawn, theirs = (
        artist.pixels(pipe(captions, sampler='ddim', steps=n, guidance=3.0, seed=0, truncate=True))
        for n in (2, 3)
    )
    network = evaluate.open_features('emoji')
    real = np.stack([x for _, x, _ in pairs(source, settings, np.arange(len(source)))])
    a, b = (Statistics.of('', network.images(x), np.arange(len(x))) for x in (real, drawn))
    assert row['fid'] == pytest.approx(metrics.frechet(a, b), rel=1e-4)
    assert row['kid'] == pytest.approx(metrics.kid(a, b)[0], rel=1e-4)
    clip = metrics.cosines(network.images(drawn), network.texts(captions)).mean()
    assert row['clip'] == pytest.approx(clip, rel=1e-4)
    some = spread(24, 9)
    assert len({*some}) == 9 and some[-1] > 20
    assert row['psnr'] == pytest.approx(metrics.psnr(drawn[some], theirs[some]).mean(), rel=1e-4)


def test_report_says_what_was_measured(done):
    workdir, _ = done
    text = (workdir / 'report.md').read_text()
    assert 'FID (lower is better)' in text and '24 captions of `emoji-heldout:noto`' in text
    assert 'biased upwards' in text and 'emoji' in text
    with (
        Image.open(workdir / 'grid.png') as grid,
        Image.open(workdir / 'quality-some.png') as p,
    ):
        assert min(*grid.size, *p.size) > 100
    assert json.loads((workdir / 'results.json').read_text())['protocol']['seed'] == 0


def test_cells_are_measured_once_and_again_if_anything_changed(model, tmp_path, monkeypatch):
    drawn = []
    draw = artist.Artist.draw

    def counted(self, cell, *args):
        drawn.append(cell.name)
        return draw(self, cell, *args)

    monkeypatch.setattr(artist.Artist, 'draw', counted)
    first = evaluate.run(config(model, 8), tmp_path)
    assert {*drawn} == {
        'teacher, 3 steps',
        *(f'few, guidance {g}, {n} step{"s" * (n > 1)}' for g in (1, 3) for n in (1, 2)),
    }
    drawn.clear()
    assert evaluate.run(config(model, 8), tmp_path) == first and not drawn
    (tmp_path / 'cells' / 'some' / 'few-guidance-1-2-steps.json').write_text('{"half')
    again = evaluate.run(config(model, 8), tmp_path)
    assert again['sets'][0]['rows'][3]['fid'] == first['sets'][0]['rows'][3]['fid']
    assert {*drawn} == {'few, guidance 1, 2 steps'}
    drawn.clear()
    other = config(model, 8)
    other.prompts = ('a cow',)  # for the grid only
    assert evaluate.run(other, tmp_path) == again and len(drawn) == 5
    drawn.clear()
    pairs_of = evaluate.pairs

    def reworded(*args):
        for number, picture, caption in pairs_of(*args):
            yield number, picture, caption.replace('noto', 'Noto')

    with monkeypatch.context() as patch:  # the source's files, under the same name
        patch.setattr(evaluate, 'pairs', reworded)
        evaluate.run(config(model, 8), tmp_path)
    assert len({*drawn}) == 5
    drawn.clear()
    evaluate.run(config(model, 8, seed=1), tmp_path)
    assert len({*drawn}) == 5
    drawn.clear()
    other = config(model, 8, seed=1)
    other.ways[0]['label'] = 'FEW!'  # the same files
    found = evaluate.run(other, tmp_path)['sets'][0]['rows']
    assert not drawn and found[-1]['label'] == 'FEW!, guidance 3'
    other.reference = ''
    found = evaluate.run(other, tmp_path)['sets'][0]['rows']
    assert len({*drawn}) == 4 and not any('psnr' in row for row in found)  # the teacher's had none


def test_a_cell_is_measured_again_if_the_models_settings_changed(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / 'model')
    c = config(folder, 8)
    c.ways, c.prompts = c.ways[1:], ()
    first = evaluate.run(c, tmp_path)['sets'][0]['rows'][1]
    file = folder / 'scheduler' / 'scheduler_config.json'
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {'beta_end': said['beta_end'] / 2}))
    assert evaluate.run(c, tmp_path)['sets'][0]['rows'][1]['fid'] != first['fid']


@pytest.mark.parametrize(
    ('way', 'said'),
    [
        (
            {'label': 'a', 'sampler': 'ddim', 'step': 3},
            "unknown key of ways (a) 'step' (did you mean 'steps'",
        ),
        ({'label': 'a'}, 'a row of ways lacks sampler'),
        ({'label': 'a', 'sampler': 'dimm'}, "unknown sampler 'dimm'"),
        ({'label': 'a', 'sampler': 'ddim', 'lora': 'lmc:1'}, 'lmc'),
        ({'label': 'a', 'sampler': 'lcm', 'steps': (4, 64)}, 'ways (a): steps = 64; lcm takes'),
        ({'label': 'a', 'sampler': 'ddim', 'spacing': 'even'}, "ways (a): unknown spacing 'even'"),
        (
            {'label': 'a', 'sampler': 'lcm', 'model': 'runs/no/lcm'},
            "'runs/no/lcm' is neither a shipped model",
        ),
        (
            {'label': 'First', 'sampler': 'dpm', 'steps': 1},
            "two ways would be called 'First, 1 step'",
        ),
    ],
)
def test_ways_that_cannot_be_are_refused_before_anything_is_drawn(
    model, tmp_path, way, said, monkeypatch
):
    c = config(model)
    c.ways, c.reference = ({'label': 'first', 'sampler': 'ddim', 'steps': 1}, way), ''
    monkeypatch.setattr(artist.Artist, 'draw', lambda *_: pytest.fail('drawn'))
    with pytest.raises(InputError) as e:
        evaluate.run(c, tmp_path)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'sets': ()}, 'sets is empty'),
        ({'sets': (('A b', 'emoji', 8), ('a-b', 'emoji', 8))}, "two sets would be called 'a-b'"),
        ({'sets': (('a', 'emoji', 8), ('b', 'emoij', 8))}, 'emoij'),
        ({'batch': 0}, 'batch = 0'),
        ({'resolution': 32}, 'resolution = 32 px of the real pictures, but '),
        ({'steps': (1, 0)}, 'ways (dpm): steps = 0'),
        ({'reference': 'few'}, "reference 'few' has several numbers of steps"),
    ],
)
def test_configs_that_cannot_be_are_refused_before_anything_is_drawn(
    model, tmp_path, changes, said, monkeypatch
):
    c = config(model)
    c.ways = (
        {'label': 'few', 'sampler': 'ddim', 'steps': (1, 2)},
        {'label': 'teacher', 'sampler': 'ddim', 'steps': 3},
        {'label': 'dpm', 'sampler': 'dpm'},
    )
    c.update(changes)
    monkeypatch.setattr(artist.Artist, 'draw', lambda *_: pytest.fail('drawn'))
    with pytest.raises(InputError) as e:
        evaluate.run(c, tmp_path)
    assert said in str(e.value)


def test_the_times_of_a_way_can_be_spaced_otherwise(model, tmp_path):
    c = config(model, 8)
    c.ways = (
        *(
            {'label': f'ddim {name}', 'sampler': 'ddim', 'steps': 2, 'spacing': name}
            for name in ('', 'trailing')
        ),
    )
    c.reference, c.prompts = '', ()
    own, other = evaluate.run(c, tmp_path)['sets'][0]['rows'][1:]
    assert own['fid'] != other['fid']
    assert 'sampler `ddim` at `trailing` times' in (tmp_path / 'report.md').read_text()


def test_pictures_compared_lie_evenly_in_their_set():
    assert spread(1024, 4).tolist() == [0, 256, 512, 768]
    assert spread(7, 5).tolist() == [0, 1, 2, 4, 5]
    assert spread(3, 9).tolist() == [0, 1, 2] and spread(3, 0).tolist() == []


def test_the_report_says_when_real_pictures_are_compared_with_themselves(done):
    assert 'is no floor' in report.markdown(done[1], '', [])
    found = json.loads(json.dumps(done[1]))
    found['protocol']['real'] = 'another'
    assert 'is no floor' not in report.markdown(found, '', [])


def test_a_set_of_too_few_pictures_is_said_to_be_biased(done):
    found = json.loads(json.dumps(done[1]))
    many = found['sets'] + found['sets']
    many[0] = {**many[0], 'rows': [{**row, 'biased': False} for row in many[0]['rows']]}
    assert 'biased upwards' in report.markdown({**found, 'sets': many}, '', [])
    assert 'biased upwards' not in report.markdown({**found, 'sets': many[:1]}, '', [])


def test_statistics_of_two_processes_are_those_of_one():
    rng = np.random.default_rng()
    x = rng.normal(size=(300, 16)).astype(np.float32)
    numbers = np.arange(300)
    whole = judge.Tally(Statistics.of('f', x, numbers), {'clip': np.array([np.abs(x).sum(), 300])})
    parts = []
    for process in range(2):
        tally = judge.Tally()
        for start in range(process * 40, 300, 80):
            some = slice(start, start + 40)
            tally.add(
                judge.Tally(
                    Statistics.of('f', x[some], numbers[some]),
                    {'clip': np.array([np.abs(x[some]).sum(), len(x[some])])},
                )
            )
        parts.append(judge.Tally.load(tally.dump()))
    parts[0].add(parts[1])
    for name, value in whole.statistics.arrays().items():
        if value.dtype.kind in 'fu':
            np.testing.assert_allclose(
                parts[0].statistics.arrays()[name], value, rtol=1e-10, atol=1e-10
            )
    assert parts[0].statistics.n == 300
    np.testing.assert_allclose(parts[0].sums['clip'], whole.sums['clip'], rtol=1e-5)


CONFIG = """
import runpy
def get_config():
    c = runpy.run_path({default!r})['get_config']()
    c.model, c.real, c.reference = {model!r}, 'emoji-heldout:noto', 'teacher'
    c.ways = (
        {{'label': 'few', 'sampler': 'lcm', 'steps': 2}},
        {{'label': 'teacher', 'sampler': 'ddim', 'steps': 3, 'guidance': 3.0}},
    )
    c.sets = (('some', 'emoji-heldout:noto', 26),)
    c.resolution, c.paired, c.batch = 16, 17, 4
    return c
"""


def test_two_processes_of_two_devices_measure_what_one_does(model, tmp_path):
    """The last batch is not full, and one process has one batch more than the other."""
    file = tmp_path / 'config.py'
    file.write_text(CONFIG.format(default=str(runs.CONFIGS / 'eval.py'), model=str(model)))
    one = evaluate.run(read(file, {}), tmp_path / 'one')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
        'PYTHONPATH': os.pathsep.join([str(runs.ROOT), *sys.path]),
    }
    command = [sys.executable, '-m', 'lcm_jax.evaluate', f'--config={file}']
    command += [f'--workdir={tmp_path / "two"}', f'--coordinator=127.0.0.1:{port}', '--processes=2']
    both = [
        subprocess.Popen(
            [*command, f'--process={i}'],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [p.communicate(timeout=600)[0] for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], '\n'.join(said)
    two = json.loads((tmp_path / 'two' / 'results.json').read_text())
    for a, b in zip(one['sets'][0]['rows'], two['sets'][0]['rows'], strict=True):
        assert a['n'] == b['n'] and a['label'] == b['label']
        measured = {'fid', 'kid', 'clip', 'psnr', 'lpips'} & a.keys()
        assert {'fid', 'kid', 'clip'} <= measured <= b.keys()
        for key in measured:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    ('make', 'said'),
    [
        (lambda f: None, 'needs two pictures of each set'),
        (
            lambda f: Image.new('RGB', (16, 24)).save(f / 'b.png'),
            'pictures of 2 sizes, or not square: a.png 16 x 16',
        ),
        (
            lambda f: (f / 'b.png').write_bytes(b'no picture'),
            '1 picture cannot be read (first: b.png',
        ),
        (lambda f: (f / 'a.png').unlink(), 'no samples'),
    ],
)
def test_folders_that_cannot_be_measured(tmp_path, make, said):
    folder = tmp_path / 'set'
    folder.mkdir()
    Image.new('RGB', (16, 16), 'red').save(folder / 'a.png')
    make(folder)
    with pytest.raises(InputError) as e:
        measure.compare(f'pictures:{folder}', f'pictures:{folder}')
    assert said in str(e.value)


def test_a_picture_that_is_cut_off_is_said_and_not_measured_anew(tmp_path, capsys, monkeypatch):
    for i in range(30):
        Image.effect_noise((16, 16), 50 + i).convert('RGB').save(tmp_path / f'{i:02}.png')
    whole = (tmp_path / '03.png').read_bytes()
    (tmp_path / '03.png').write_bytes(whole[: len(whole) // 2])
    source, features = f'pictures:{tmp_path}', evaluate.open_features('emoji')
    with monkeypatch.context() as patch:
        patch.setattr(DataSettings, 'max_dropped', 0.1)
        assert measure.side(features, source, 0)().n == 29
        assert 'left out 1 ' in capsys.readouterr().out
        patch.setattr(measure, 'streamed', lambda *_: pytest.fail('measured'))
        assert measure.side(features, source, 0)().n == 29


def test_a_cache_has_no_pictures_to_measure():
    cache = types.SimpleNamespace(encoded=True, name='cache:latents')
    with pytest.raises(InputError, match='cache:latents holds no pictures'):
        measure.statistics_of(None, cache, DataSettings(), [0])


def test_both_sets_are_opened_before_one_is_measured(monkeypatch):
    monkeypatch.setattr(measure, 'statistics_of', lambda *_: pytest.fail('measured'))
    with pytest.raises(InputError, match='emoij'):
        measure.compare('emoji-heldout:noto', 'emoij')


@pytest.mark.parametrize('broken', [b'', b'PK', b'{}'])
def test_what_a_killed_evaluation_left_is_measured_again(tmp_path, broken):
    file = tmp_path / 'cell'
    file.write_bytes(broken)
    assert evaluate.kept_pictures(file, {}) is None and evaluate.kept_row(file, {}) is None


def test_kept_statistics_of_another_form_are_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, 'cache_folder', lambda: tmp_path / 'kept' / 'index')
    Image.new('RGB', (64, 64), 'red').save(tmp_path / 'red.png')
    features = evaluate.open_features('emoji')
    want = measure.side(features, f'pictures:{tmp_path}', 0)()
    (file,) = (tmp_path / 'kept' / 'statistics').iterdir()
    older = dataclasses.replace(want, features=features.identity)  # before it told sizes
    for write in (lambda f: np.savez(f, **older.arrays()), lambda f: f.write(b'PK')):
        with file.open('wb') as f:
            write(f)
        found = measure.side(features, f'pictures:{tmp_path}', 0)()
        assert found.features == want.features == Statistics.load(file).features
    monkeypatch.setattr(measure, 'streamed', lambda *_: pytest.fail('measured'))
    measure.side(features, f'pictures:{tmp_path}', 0)()


def test_pictures_of_any_size_are_measured(tmp_path):
    for i in range(3):
        shade = Image.new('L', (100, 100), 90 * i).convert('RGB')
        shade.save(tmp_path / f'{i}.png')
    found = measure.compare(f'pictures:{tmp_path}', f'pictures:{tmp_path}')
    assert found['fid'] == pytest.approx(0, abs=1e-3) and found['real'] == 3


def test_measure_prints_the_distance_and_keeps_statistics(tmp_path, capsys):
    kept = tmp_path / 'real.npz'
    for name in ('real', 'no/real.npz'):
        with pytest.raises(SystemExit):
            main(['measure', 'emoji', 'emoji', '--save-real', str(tmp_path / name)])
        assert 'must end in .npz' in capsys.readouterr().err
    main(['measure', 'emoji-heldout:noto', 'emoji-heldout:twemoji', '--save-real', str(kept)])
    said = capsys.readouterr().out
    main(['measure', str(kept), 'emoji-heldout:twemoji'])
    again = capsys.readouterr().out
    assert said.splitlines()[0] == again.splitlines()[0] and said.startswith('FID ')
    assert 'biased upwards' in said
    with pytest.raises(InputError, match=r'pictures of 64 x 64 px.* and of .*32 x 32 px'):
        measure.compare(str(kept), 'emoji-heldout:twemoji', resolution=32)
    found = Statistics.load(kept)
    with open(kept, 'wb') as file:
        np.savez(file, **dataclasses.replace(found, features='another').arrays())
    with pytest.raises(InputError, match="statistics of features 'another'; this network is"):
        measure.side(evaluate.open_features('emoji'), str(kept), 0)
    kept.write_bytes(b'nothing')
    with pytest.raises(InputError, match='holds no statistics'):
        measure.side(evaluate.open_features('emoji'), str(kept), 0)


def test_sweep_draws_a_row_for_each_scale(tmp_path, capsys):
    out = tmp_path / 'sweep.png'
    main(
        [
            'sweep',
            'red heart, noto emoji',
            '--lora',
            'lcm',
            '--scales',
            '0',
            '1',
            '--steps',
            '1',
            '2',
            '--out',
            str(out),
        ]
    )
    said = capsys.readouterr().out
    assert '1 prompts; sampler lcm, seed 0, guidance 1\n' in said
    assert '| scale 0 |' in said and '| scale 1 |' in said
    pipe = Pipeline.load('emoji')  # at scale 0 the sampler is still the LoRA's
    prompts = ['red heart, noto emoji']
    base = pipe(prompts, sampler='lcm', steps=2, guidance=1.0, seed=0)
    network = evaluate.open_features('emoji')
    want = metrics.cosines(network.images(base), network.texts(prompts))[0]
    scale_0 = said.split('| scale 0 |')[1].splitlines()[0].split('|')
    assert float(scale_0[1]) == pytest.approx(want, abs=0.1)
    with Image.open(out) as picture:
        assert picture.size[1] > 2 * 96
    for more, said in (
        ([], 'nothing to try: give --lora FILE, or several values of --guidance'),
        (['--lora', 'lcm', '--guidance', '1', '2'], 'name it with --also'),
    ):
        with pytest.raises(SystemExit, match=said):
            main(['sweep', 'x', *more, '--out', str(out)])


def test_every_key_is_read(model, tmp_path):
    """Of configs/eval.py."""
    c, read = config(model, 3), set()
    c.ways = ({'label': 'teacher', 'sampler': 'ddim', 'guidance': 3.0},)
    c.steps = (1,)
    evaluate.run(runs.Recording(c, read), tmp_path)
    assert read == {*c}


def test_results_without_networks_for_captions(model, tmp_path):
    c = config(model, 8, clip='', lpips='')
    c.ways = c.ways[1:]
    rows = evaluate.run(c, tmp_path)['sets'][0]['rows']
    assert 'clip' not in rows[1] and 'lpips' not in rows[1]
    assert 'CLIP score' not in report.markdown(evaluate.run(c, tmp_path), '', [])


def test_help_of_the_program():
    out = subprocess.run(
        [sys.executable, '-m', 'lcm_jax.evaluate', '--help'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '--config=configs/eval_NAME.py' in out.stdout


def test_loras_of_a_way_are_parted_by_a_plus_between_spaces():
    assert cells.terms('') == []
    assert cells.terms(' fluent:0.8 + lcm ') == [('fluent', 0.8), ('lcm', 1.0)]
    assert cells.terms('runs/dpm++/a.safetensors') == [('runs/dpm++/a.safetensors', 1.0)]
