"""The trainer in one process: what it is told, what it leaves out, where it goes on, what it exports."""

import ast
import dataclasses
import itertools
import json
import re
import runpy
import tokenize
import weakref
from pathlib import Path
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from random_model import write_model
from safetensors.numpy import load_file, save_file
from sets import encoded, sample, tar_of

from lcm_jax import demo, export, feed, metrics, sharding, step, train
from lcm_jax.data import cache
from lcm_jax.data.emoji import emoji
from lcm_jax.data.settings import DataSettings
from lcm_jax.errors import InputError
from lcm_jax.features import open_features
from lcm_jax.grid import pixels
from lcm_jax.lora import delta
from lcm_jax.lora_files.files import read_lora
from lcm_jax.model import describe
from lcm_jax.models import shapes
from lcm_jax.pipeline import Pipeline
from lcm_jax.saves import flat

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # ml_collections' own
CONFIGS = sorted(p.stem for p in runs.CONFIGS.glob('*.py') if not p.stem.startswith('eval'))


@pytest.fixture(scope='module', autouse=True)
def quick_compiler():
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return runs.write_tiny(tmp_path_factory.mktemp('model') / 'tiny')


# --- the configs


def leaves(name):
    """A config -> {'train.lr': value}."""
    return flat(runpy.run_path(str(runs.CONFIGS / f'{name}.py'))['get_config']().to_dict())


@pytest.mark.parametrize('name', [name for name in CONFIGS if name != 'default'])
def test_configs_override_five_to_fifteen_keys(name):
    default, own = leaves('default'), leaves(name)
    changed = [key for key in own if own[key] != default[key]]
    written = (runs.CONFIGS / f'{name}.py').read_text().count('\n    c.')
    assert own.keys() == default.keys() and len(changed) >= 5 and written <= 15, changed


def test_every_key_is_commented_where_it_is_defined():
    file = runs.CONFIGS / 'default.py'
    with open(file, 'rb') as source:
        commented = {
            t.start[0] for t in tokenize.tokenize(source.readline) if t.type == tokenize.COMMENT
        }
    keys = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            key = ast.unparse(node.targets[0]).removeprefix('c.')
            keys[key] = bool(commented & {*range(node.lineno, node.end_lineno + 1)})
    assert {*leaves('default')} <= {*keys}
    assert not [key for key in leaves('default') if not keys[key]]


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


def test_every_key_is_read(model, tmp_path, monkeypatch):
    read = set()

    @dataclasses.dataclass(frozen=True)
    class Settings(DataSettings):
        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, '_made', True)

        def __getattribute__(self, name):
            if '_made' in object.__getattribute__(self, '__dict__'):
                read.add(f'data.{name}')
            return super().__getattribute__(name)

    monkeypatch.setattr(feed, 'DataSettings', Settings)
    for name, changes in {
        'lora': {
            'objective': 'denoise',
            'data.validation': 'synthetic:8',
            'data.validation_batches': 1,
        },
        'full': {'trains': 'full', 'data.cache': True},
    }.items():
        changes = {'train.steps': 1, 'train.decay': True, 'train.warmup': 0} | changes
        config, workdir, _ = train.parse(runs.arguments(model, tmp_path / name, changes))
        train.run(Recording(config, read), workdir)
        there = {p.name for p in Path(workdir).iterdir() if not p.name.startswith('events.')}
        own = {Path(name).stem for name in there - {*export.RESERVED}}
        assert own == {'lora', 'lora_best'}
    assert {*leaves('default')} - read == set()


@pytest.mark.parametrize(
    ('argument', 'said'),
    [
        ('train.step=5', "'step' .did you mean 'steps'"),
        ('trian.steps=5', "did you mean 'train'"),
        ('train.steps=many', 'many'),
        ('model.size=3', 'size'),
        ('data=3', 'data'),
    ],
)
def test_what_is_no_key_or_value_is_refused(argument, said):
    config = f'--config={runs.CONFIGS / "default.py"}'
    with pytest.raises(InputError, match=said):
        train.parse([config, '--workdir=x', f'--config.{argument}'])


def test_command_lines_that_lack_something(tmp_path):
    config = f'--config={runs.CONFIGS / "default.py"}'
    for arguments, said in (
        ([config], 'workdir'),
        (['--workdir=x'], 'no --config'),
        ([config, '--workdir=x', 'more'], 'more'),
        ([config, '--workdir=x', '--batch=3'], 'batch'),
        (['--config=none.py', '--workdir=x'], 'none.py'),
    ):
        with pytest.raises(InputError, match=said):
            train.parse(arguments)


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({'objective': 'lmc'}, "did you mean 'lcm'"),
        ({'trains': 'all'}, 'lora, full'),
        ({'dtype': 'float16'}, 'bfloat16'),
        ({'distill__distance': 'hubert'}, "did you mean 'huber'"),
        ({'distill__solver': 'euler'}, 'dpm'),
        ({'distill__target': 'teacher'}, 'student, ema'),
        ({'distill__null': 'none'}, 'zeros'),
        ({'distill__w': '5:2'}, 'LOW:HIGH'),
        ({'distill__target': 'ema', 'train__ema_decay': 0.0}, 'ema_decay'),
        ({'export__weights': 'best'}, 'params, ema'),
        ({'train__batch': 48}, 'not exceed'),
        ({'train__accumulate': 3}, 'multiple of 3'),
        ({'train__accumulate': 0}, r'train\.accumulate = 0; it must be at least 1'),
        ({'train__clip': -1.0}, r'train\.clip = -1\.0; it must be at least 0'),
        ({'train__lr': float('nan')}, r'train\.lr = nan; it must be at least 0'),
        ({'lora__rank': 0}, r'lora\.rank = 0; it must be at least 1'),
        ({'data__validation_batches': 0}, 'validation_batches = 0; it must be at least 1'),
        ({'train__decay': True, 'train__warmup': 6}, 'must be less'),
        ({'train__remat': 'block'}, 'blocks'),
        ({'trains': 'full', 'full__trainable': 'to_quack'}, 'to_quack'),
        ({'mesh__fsdp': 3}, 'mesh'),
        ({'preview__sampler': 'ddmi'}, "did you mean 'ddim'"),
        ({'data__source': 'synthetc:4'}, "did you mean 'synthetic'"),
    ],
)
def test_settings_outside_the_tables_are_refused(model, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        runs.run(model, tmp_path / 'run', **settings)
    assert (
        not (tmp_path / 'run' / 'checkpoints').is_dir() or not runs.checkpoints(tmp_path / 'run')[0]
    )


@pytest.mark.parametrize(
    'name', ['', '.', '..', '.hidden', '../other', 'a/b', 'a\\b', *export.RESERVED, 'Cache']
)
def test_names_under_which_nothing_is_exported(model, tmp_path, name):
    with pytest.raises(InputError, match=re.escape(f'export.name = {name!r}; give a name in')):
        runs.run(model, tmp_path, export__name=name)


def test_a_folder_that_holds_no_model_is_not_replaced(model, tmp_path):
    (tmp_path / 'mine').mkdir()
    with pytest.raises(InputError, match='mine is there and holds no model'):
        export.export_folder(tmp_path / 'mine', {}, None, None, None)
    assert (tmp_path / 'mine').is_dir()


# --- the loss


def test_gradient_steps_lower_the_loss_towards_a_fixed_target(model):
    """The loss itself has a moving target and need not fall; with the target held, it must."""
    settings = {'distill.target': 'ema', 'data.cache': True}
    config = train.parse(runs.arguments(model, 'unused', settings))[0]
    what, mesh = describe(config.model), sharding.make_mesh(devices=jax.devices()[:1])
    prog = step.program(what.specs, what.family, what.schedule, config, mesh)
    rng = np.random.default_rng(0)
    batch = {
        name: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        for name, x in prog.batch((16, 16)).items()
    } | {'row': jnp.arange(8)}
    base = what.load(['unet'], {'unet': jnp.float32})
    null = {'context': jnp.zeros((1, 77, 8))}
    params = start = prog.student.init(jax.random.key(0), base['unet'])
    value = jax.jit(jax.value_and_grad(prog.loss))
    tx = optax.adam(1e-2)
    opt, values = tx.init(start), []
    for _ in range(10):
        now, grads = value(params, start, base | {'null': null}, batch, jax.random.key(7))
        values.append(float(now))
        updates, opt = tx.update(grads, opt)
        params = optax.apply_updates(params, updates)
    assert values[-1] < 0.9 * values[0], values


def test_a_clip_of_0_is_no_limit():
    c = runpy.run_path(str(runs.CONFIGS / 'default.py'))['get_config']().train
    updates = []
    for clip in (0.0, 1e9):
        c.update(clip=clip, warmup=0)
        tx, _ = step.optimizer(c)
        updates.append(tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))[0])
    np.testing.assert_array_equal(*updates)
    assert np.all(updates[0] != 0)


# --- steps that are left out


@pytest.fixture
def poison(monkeypatch):
    """poison(samples): the latents of these samples of a source are NaN when its cache is read."""

    def poison(samples):
        fetch = cache.fetch

        def poisoned(paths, arrays, place):
            out = fetch(paths, arrays, place)
            bad = place[1] in samples  # the number of the record
            return out | {'mean': np.full_like(out['mean'], np.nan)} if bad else out

        monkeypatch.setattr(cache, 'fetch', poisoned)

    return poison


def test_a_step_that_is_not_finite_changes_nothing(model, tmp_path, poison, monkeypatch):
    poison([3])
    named = []
    monkeypatch.setattr(
        train.loop.Watch, 'add', lambda self, i, metrics, names, add=train.loop.Watch.add: (
            named.append(names), add(self, i, metrics, names)
        ),
    )  # fmt: skip
    runs.run(
        model,
        tmp_path / 'run',
        data__cache=True,
        train__steps=5,
        train__save_every=1,
        train__keep=9,
    )
    bad = [i for i, names in enumerate(named, 1) if '00000003' in names]
    assert len(bad) == 1  # of an epoch
    (bad,), states = bad, [runs.state(tmp_path / 'run', i) for i in range(1, 6)]
    assert [int(s['skipped']) for s in states] == [int(i >= bad) for i in range(1, 6)]
    assert [int(s['step']) for s in states] == [1, 2, 3, 4, 5]
    for i, (before, after) in enumerate(itertools.pairwise(states), 2):
        kept = [k for k in before if k not in ('step', 'skipped')]
        changed = [k for k in kept if before[k].tobytes() != after[k].tobytes()]
        assert bool(changed) == (i != bad), (i, changed)
    assert all(np.isfinite(x).all() for x in runs.exported(tmp_path / 'run').values())


def test_many_such_steps_in_a_row_end_the_run(model, tmp_path, poison):
    poison(range(40))
    with pytest.raises(InputError, match=r'3 steps in a row .* not finite; step 1: 0000\d{4}, '):
        runs.run(model, tmp_path / 'run', data__cache=True, train__max_skipped=2)


def test_skipped_steps_are_counted_on_after_a_resume():
    def skip(state, frozen, batch, key):
        return state._replace(step=state.step + 1), {'finite': False}

    said, start = [], train.loop.State(jnp.int32(3), jnp.int32(2), None, None, None)
    train.loop.fit(
        skip, start, None, lambda i: iter([(None, ['a'])] * 2), None, steps=5,
        saves=mock.Mock(), log=lambda i, means, *_: said.append(means['skipped']),
        save_every=9, log_every=1,
    )  # fmt: skip
    assert said == [3, 4]


# --- going on


def test_another_recipe_is_refused_and_a_longer_run_goes_on(model, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    runs.run(model, whole, train__steps=4)
    runs.run(model, parts, train__steps=3)
    with pytest.raises(
        InputError, match=r'train\.lr = 0\.001 \(now 0\.01\); go on with its settings'
    ):
        runs.run(model, parts, train__steps=4, train__lr=1e-2)
    with pytest.raises(InputError, match=r"distill\.w = '2:4' \(now '2:5'\)"):
        runs.run(model, parts, train__steps=4, distill__w='2:5')
    runs.run(model, parts, train__steps=4, train__keep=5, data__threads=2, preview__seed=1)
    runs.same(runs.state(whole), runs.state(parts))
    runs.same(runs.exported(whole), runs.exported(parts))
    assert runs.losses(whole) == runs.losses(parts) and len(runs.losses(parts)) == 4


def test_an_unfinished_checkpoint_is_never_picked(model, tmp_path, capsys):
    """Steps 2 and 4 are saved; 4 looks as it does when the process was killed while it wrote.

    Then 6 lacks the mark of its commit, as a copy does that was broken off.
    """
    folder, whole = tmp_path / 'run' / 'checkpoints', tmp_path / 'whole'
    runs.run(model, whole, train__steps=6)
    runs.run(model, tmp_path / 'run', train__steps=4)
    (folder / '4').rename(folder / '4.orbax-checkpoint-tmp')
    capsys.readouterr()
    runs.run(model, tmp_path / 'run', train__steps=6)
    assert 'going on from step 2 ' in capsys.readouterr().out
    runs.same(runs.state(whole), runs.state(tmp_path / 'run'))
    assert sorted(runs.losses(tmp_path / 'run')) == [1, 2, 3, 4, 5, 6]
    assert not runs.checkpoints(tmp_path / 'run')[1]
    (folder / '6' / 'commit_success.txt').unlink()
    runs.run(model, tmp_path / 'run', train__steps=6)
    said = capsys.readouterr().out
    assert 'checkpoints/6 is damaged' in said and 'going on from step 4 ' in said
    runs.same(runs.state(whole), runs.state(tmp_path / 'run'))
    assert runs.losses(whole) == runs.losses(tmp_path / 'run')


def test_a_damaged_checkpoint_is_named(model, tmp_path):
    runs.run(model, tmp_path, train__steps=2)
    for file in (tmp_path / 'checkpoints' / '2' / 'state').glob('ocdbt.process_0/d/*'):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match='checkpoints/2 cannot be restored'):
        runs.run(model, tmp_path, train__steps=4)


def test_the_best_is_known_after_a_resume(model, tmp_path):
    """A worse one does not replace it; what SIGTERM saves has no metrics and is no best."""
    runs.run(model, tmp_path, train__steps=2)
    first = runs.exported(tmp_path, 'lora_best')
    file = tmp_path / 'checkpoints' / '2' / 'metrics' / 'metrics'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'distance': 0.0}))
    runs.run(model, tmp_path, train__steps=8)
    runs.same(first, runs.exported(tmp_path, 'lora_best'))
    assert runs.checkpoints(tmp_path)[0] == [2, 6, 8]


def test_a_run_says_what_its_sources_leave_out(model, tmp_path, capsys):
    members = [m for i in range(8) for m in sample(f'{i}', size=(16, 16))]
    tar = tar_of(tmp_path / 'x.tar', [*members, *sample('9', caption='')])
    changes = {'data.source': f'wds:{tar}', 'data.validation': f'wds:{tar}', 'data.max_dropped': 1}
    config, _, _ = train.parse(runs.arguments(model, tmp_path / 'run', changes))
    mesh = sharding.make_mesh()
    feed.Feed(describe(str(model)), config, mesh, tmp_path / 'run').close()
    line = f'wds:{tar}: broken, by the index: 1 empty caption (first: x.tar/9)\n'
    assert capsys.readouterr().out == 2 * line


def test_pictures_are_compared_with_those_of_the_same_settings(model, tmp_path, capsys):
    """Drawn again where preview.* has changed, here to another number of prompts."""
    run, new = tmp_path / 'run', {'train__steps': 2, 'preview__prompts': ('a disc', 'a ring')}
    runs.run(model, run, train__steps=1)
    assert 'drawn again' not in capsys.readouterr().out
    runs.run(model, run, **new)
    assert 'it is drawn again' in capsys.readouterr().out
    runs.run(model, tmp_path / 'new', train__save_every=1, **new)
    files = (w / 'preview' / 'references.npz' for w in (run, tmp_path / 'new'))
    runs.same(*(dict(np.load(file)) for file in files))
    last = [[x for x in runs.lines(w) if 'distance' in x][-1] for w in (run, tmp_path / 'new')]
    assert last[0] == last[1]


def test_the_new_state_is_gone_before_the_old_one_is_read(model, tmp_path, monkeypatch):
    """Two of them would be the largest thing in memory."""
    kept, alive = [], []

    def place(*args, place=train.place):
        there = place(*args)
        kept.extend(weakref.ref(x) for x in jax.tree.leaves(there.state))
        return there

    def restore(self, abstract, restore=train.Saves.restore):
        alive.extend(x for x in kept if x() is not None)
        return restore(self, abstract)

    runs.run(model, tmp_path, train__steps=1)
    monkeypatch.setattr(train, 'place', place)
    monkeypatch.setattr(train.Saves, 'restore', restore)
    runs.run(model, tmp_path, train__steps=2)
    assert kept and not alive


# --- the cache of a run


def test_a_cache_that_was_interrupted_is_filled_again(model, tmp_path):
    """Of one process or of several: what counts is that all parts are there."""
    whole = tmp_path / 'whole'
    runs.run(model, whole, data__cache=True, train__steps=2)
    for name, files in {
        'one': ('part-00000-of-00001.array_record',),
        'two': ('part-00001-of-00002.json', 'part-00001-of-00002.npz'),
    }.items():
        folder = tmp_path / name / 'cache'
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_bytes(b'{}')
        runs.run(model, tmp_path / name, data__cache=True, train__steps=2)
        runs.same(runs.state(whole), runs.state(tmp_path / name))
        parts = [p.name for p in sorted(folder.glob('part-*'))]
        assert {p.split('.')[0] for p in parts} == {'part-00000-of-00001'}


def test_a_cache_of_something_else_is_refused(model, tmp_path):
    runs.run(model, tmp_path, data__cache=True, train__steps=1)
    for changes, said in (
        ({'data__resolution': 20}, 'data.resolution = 20: must be a multiple of 8'),
        ({'data__source': 'synthetic:41'}, "source = 'synthetic:40' .now 'synthetic:41'"),
        ({'data__flip': True}, 'data.flip = False .now True'),
        (
            {'data__source': f'cache:{tmp_path}/cache', 'dtype': 'bfloat16'},
            "/cache: its context is float32; this run has dtype = 'bfloat16': .* --dtype bfloat16, or",
        ),
    ):
        with pytest.raises(InputError, match=said):
            runs.run(model, tmp_path, data__cache=True, train__steps=1, **changes)


@pytest.mark.parametrize(
    ('part', 'cache'),
    [('unet', True), ('vae', True), ('text_encoder', True), ('vae', False)],
)
def test_other_weights_under_the_same_name_are_refused(tmp_path, part, cache):
    model = runs.write_tiny(tmp_path / 'tiny')
    runs.run(model, tmp_path / 'run', data__cache=cache, train__steps=1)
    (file,) = (model / part).glob('*.safetensors')
    tensors = load_file(file)
    save_file({key: np.float32(1.01) * x for key, x in tensors.items()}, file)
    with pytest.raises(InputError, match=rf"weights\.{part} = '\w+' \(now '\w+'\)"):
        runs.run(model, tmp_path / 'run', data__cache=cache, train__steps=2)


def test_other_samples_under_the_same_name_are_refused(model, tmp_path):
    pictures = tmp_path / 'pictures'
    pictures.mkdir()
    settings = {'data__source': f'folder:{pictures}', 'train__steps': 1}
    for i in range(9):
        (pictures / f'{i}.png').write_bytes(encoded(size=(16, 16)))
        (pictures / f'{i}.txt').write_text('a disc')
        if i == 7:
            runs.run(model, tmp_path / 'run', **settings)
    with pytest.raises(InputError, match=r'samples\.number = 8 \(now 9\), samples\.names = '):
        runs.run(model, tmp_path / 'run', **settings)


# --- what is exported


def test_ranks_and_alphas_by_pattern_come_back_from_the_file(model, tmp_path):
    rows = (
        ('.*to_[qkv]/kernel', 2, 6.0),
        ('.*conv1/kernel', 0, 1.0),
        ('.*/(ff.*|conv.*)/kernel', 3, 1.0),
    )
    config, workdir, _ = train.parse(
        runs.arguments(model, tmp_path, {'lora.targets': rows, 'train.steps': 3, 'train.lr': 0.01})
    )
    file = train.run(config, workdir)
    base = Pipeline.load(model).params
    read, metadata = read_lora(file, base)
    state = runs.state(tmp_path)
    alphas = {2: 6.0, 3: 1.0}
    paths = {k.split('/', 1)[1].rsplit('/', 1)[0] for k in state if k.startswith('params/')}
    assert {*read['unet']} == paths and not any('conv1' in p for p in paths)
    assert {ab['down'].shape[-1] for ab in read['unet'].values()} == {2, 3}
    for path, ab in read['unet'].items():
        down, up = (state[f'params/{path}/{part}'] for part in ('down', 'up'))
        want = alphas[down.shape[-1]] / down.shape[-1] * (down @ up)
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(delta(ab), want, atol=2e-3 * np.abs(want).max())
    assert metadata['lcm_jax.accelerates'] == 'true' and metadata['lcm_jax.w'] == '2:4'


def test_the_best_is_exported_beside_the_last(model, tmp_path):
    runs.run(model, tmp_path, train__steps=8, train__lr=0.05, train__keep=9, export__weights='ema')
    scores = {x['step']: x['distance'] for x in runs.lines(tmp_path) if 'distance' in x}
    best = min(scores, key=scores.get)
    assert len(scores) == 4
    base = Pipeline.load(model).params
    for name, at in (('lora_best', best), ('lora', 8)):
        state = runs.state(tmp_path, at)
        for path, ab in read_lora(tmp_path / f'{name}.safetensors', base)[0]['unet'].items():
            want = 2.0 * state[f'ema/{path}/down'] @ state[f'ema/{path}/up']
            np.testing.assert_allclose(delta(ab), want, atol=2e-3 * np.abs(want).max() + 1e-7)


def test_a_full_lcm_opens_here_and_in_diffusers(model, tmp_path):
    out = runs.run(model, tmp_path, trains='full', full__w_dim=8, train__steps=2, train__lr=0.01)
    params = {k: x for k, x in runs.state(tmp_path).items() if k.startswith('params/')}
    pipe = Pipeline.load(out)
    assert pipe.specs['unet'].w_dim == 8
    got = dict(runs.named(pipe.params['unet']))
    assert {f'params/{k}' for k in got} == {*params}
    for k, x in got.items():
        np.testing.assert_array_equal(x, params[f'params/{k}'], err_msg=k)
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert isinstance(theirs, diffusers.LatentConsistencyModelPipeline)
    assert theirs.unet.config.time_cond_proj_dim == 8
    assert json.loads((out / 'model_index.json').read_text())['_lcm_jax']['w'] == '2:4'
    assert isinstance(theirs.scheduler, diffusers.LCMScheduler)
    prompt, noise = 'a red disc on green', np.random.default_rng(0).standard_normal((1, 4, 8, 8))
    import torch

    latents = torch.tensor(noise, dtype=torch.float32)
    picture = theirs(
        prompt, height=16, width=16, num_inference_steps=1, guidance_scale=4.0,
        original_inference_steps=50, latents=latents, output_type='np',
    ).images  # fmt: skip
    assert picture.shape == (1, 16, 16, 3) and np.isfinite(picture).all()


def test_a_full_lcm_with_two_text_encoders_opens_here_and_in_diffusers(tmp_path):
    """diffusers' LCM pipeline takes one; SDXL's own class has a guidance input too."""
    write_model(tmp_path / 'xl', tiny.MODELS['sdxl'], np.float32, keep=False)
    settings = {'trains': 'full', 'full.w_dim': 8}
    config = train.parse(runs.arguments(tmp_path / 'xl', 'unused', settings))[0]
    base = describe(tmp_path / 'xl')
    student = step.full_student(base.specs['unet'], shapes.unet_shapes(base.specs['unet']), config)
    trained = student.init(None, base.load(['unet'], {'unet': jnp.float32})['unet'])
    out = export.export(tmp_path / 'out', trained, base, student, config)
    found = describe(out)
    assert found.specs['unet'].w_dim == 8 and found.family == base.family
    found.checkpoint.tensors('unet')
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert isinstance(theirs, diffusers.StableDiffusionXLPipeline)
    assert theirs.unet.config.time_cond_proj_dim == 8


@pytest.mark.parametrize(
    ('objective', 'kind'),
    [('lcf', 'StableDiffusionPipeline'), ('lcm', 'LatentConsistencyModelPipeline')],
)
def test_a_part_of_the_unet_is_trained(model, tmp_path, objective, kind):
    """And the new guidance input of an LCM, which the base lacks."""
    settings = {'objective': objective, 'trains': 'full', 'full__trainable': '.*/attn2/.*'}
    out = runs.run(model, tmp_path, train__steps=2, train__lr=0.01, full__w_dim=8, **settings)
    before, after = (dict(runs.named(Pipeline.load(m).params['unet'])) for m in (model, out))
    new = after.keys() - before.keys()
    assert len(new) == (objective == 'lcm') and all('cond_proj' in k for k in new)
    changed = {k for k in before if np.any(np.asarray(before[k]) != np.asarray(after[k]))}
    assert changed and all('/attn2/' in k for k in changed)
    said = json.loads((out / 'model_index.json').read_text())
    assert said['_class_name'] == kind
    assert said['scheduler'] == ['diffusers', 'LCMScheduler']
    assert said['_lcm_jax']['objective'] == objective


@pytest.mark.parametrize(
    ('objective', 'w_dim', 'said'),
    [
        ('lcm', 8, {'accelerates': 'true', 'w': '2:4', 'solver': 'ddim', 'solver_steps': '50'}),
        ('lcf', 0, {'accelerates': 'true', 'solver_steps': '50'}),
        ('lcf', 8, {'accelerates': 'true', 'w': '2:4', 'solver_steps': '50'}),
        ('denoise', 0, {}),
    ],
)
def test_only_what_the_objective_used_is_recorded(model, objective, w_dim, said):
    config = train.parse(runs.arguments(model, 'unused', {'objective': objective}))[0]
    assert export.recipe(config, w_dim) == {'objective': objective} | said


# --- the demo, and what is shipped


def test_demo_writes_everything(monkeypatch, tmp_path, capsys):
    training, evaluation = demo.training, demo.evaluation

    def short_training(steps):
        config = training(steps)
        config.data.source = 'emoji-heldout:noto'
        return config

    def short_evaluation(*args):
        config = evaluation(*args)
        config.ways = ({'label': 'teacher', 'sampler': 'ddim', 'steps': 2}, config.ways[-1])
        config.real = 'emoji-heldout:noto'
        return config

    monkeypatch.setattr(demo, 'COUNT', 16)
    monkeypatch.setattr(demo, 'training', short_training)
    monkeypatch.setattr(demo, 'evaluation', short_evaluation)
    demo.demo(tmp_path, steps=2)
    assert (tmp_path / 'grid.png').stat().st_size > 20_000
    report = (tmp_path / 'report.md').read_text()
    assert 'shipped LCM-LoRA' in report and 'real pictures' in report
    assert list((tmp_path / 'train').glob('events*'))
    said = capsys.readouterr().out
    assert 'lcm-jax sample' in said and str(tmp_path / 'lcm_lora.safetensors') in said


def test_shipped_models_reach_their_figures():
    """The floor under the model card's figures, on fewer pictures: a broken weight file cannot pass."""
    samples = emoji('train', ('noto', 'twemoji'))[::26][:110]
    captions, numbers = [s.caption for s in samples], np.arange(110)
    features = open_features('emoji')
    texts = features.texts(captions)

    def found(pictures):
        return metrics.retrieved(features.images(pictures), texts, numbers).mean()

    real = found(np.stack([s.picture for s in samples]))
    pipe = Pipeline.load('emoji')
    pipe.add_lora('lcm')
    assert real > 0.8
    assert found(pixels(pipe(captions, steps=4))) > 0.6 * real
