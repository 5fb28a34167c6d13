"""The trainer in one process: what it is told, what it leaves out, where it goes on."""

import ast
import contextlib
import dataclasses
import io
import itertools
import json
import re
import runpy
import shutil
import tokenize
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from sets import encoded, sample, tar_of

from lcm_jax import export, feed, flags, sharding, step, student, train, workloads
from lcm_jax.data import cache
from lcm_jax.data.settings import DataSettings
from lcm_jax.errors import InputError
from lcm_jax.model import describe
from lcm_jax.saves import flat

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # ml_collections' own
    pytest.mark.usefixtures('quick_compiler'),
]
CONFIGS = sorted(p.stem for p in runs.CONFIGS.glob('*.py') if not p.stem.startswith('eval'))


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


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_has_a_step(name):
    """At its model's full size; nothing is computed."""
    config = flags.read(runs.CONFIGS / f'{name}.py', {})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    prog = step.program(*workloads.sizes_of(config.model), config, mesh)
    assert prog.batch((config.data.resolution,) * 2)['row'].shape == (config.train.batch,)


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
            'train.best': 'validation',
        },
        'full': {'trains': 'full', 'data.cache': True},
    }.items():
        changes = {'train.steps': 1, 'train.decay': True, 'train.warmup': 0} | changes
        workdir = tmp_path / name
        train.run(runs.Recording(runs.config(model, changes), read), workdir)
        there = {p.name for p in workdir.iterdir() if not p.name.startswith('events.')}
        own = {Path(name).stem for name in there - {*export.RESERVED}}
        assert own == {'lora', 'lora_best'}
    assert {*leaves('default')} - read == set()


@pytest.mark.parametrize(
    ('key', 'value', 'said'),
    [
        ('train.step', 5, "'step' .did you mean 'steps'"),
        ('trian.steps', 5, "did you mean 'train'"),
        ('train.steps', 'many', 'many'),
        ('model.size', 3, 'size'),
        ('data', 3, 'data'),
    ],
)
def test_what_is_no_key_or_value_is_refused(key, value, said):
    with pytest.raises(InputError, match=said):
        flags.read(runs.CONFIGS / 'default.py', {key: value})


def test_a_file_that_is_no_config_is_refused(tmp_path):
    (tmp_path / 'empty.py').write_text('def get_config():\n    return None\n')
    (tmp_path / 'other.py').write_text('x = 3\n')
    for name, said in (
        ('none.py', 'No such file .*none.py'),
        ('empty.py', r'empty.py: its get_config\(\) must give a ConfigDict'),
        ('other.py', 'get_config'),
    ):
        with pytest.raises(InputError, match=said):
            flags.read(tmp_path / name, {})


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
        ({'distill__w': '5:2'}, 'distill: .* LOW:HIGH'),
        ({'distill__target': 'ema', 'train__ema_decay': 0.0}, 'ema_decay'),
        ({'export__weights': 'best'}, 'params, ema'),
        ({'train__batch': 48}, 'not exceed'),
        ({'train__accumulate': 3}, 'multiple of 3'),
        ({'train__accumulate': 0}, r'train\.accumulate = 0; it must be at least 1'),
        ({'train__clip': -1.0}, r'train\.clip = -1\.0; it must be at least 0'),
        ({'train__lr': float('nan')}, r'train\.lr = nan; it must be at least 0'),
        ({'lora__rank': 0}, r'lora\.rank = 0; it must be at least 1'),
        (
            {'lora__targets': (('.*to_q/kernel', 4),)},
            r"has \('.*', 4\); a row is \(regex, rank, alpha",
        ),
        ({'lora__targets': (('*', 4, 4.0),)}, r"'\*' is no regular expression"),
        ({'full__trainable': '(', 'trains': 'full'}, r"'\(' is no regular expression"),
        ({'mesh__rules': (('.*',),)}, r"rule \('.*',\); one is \(regex"),
        (
            {'distill__skip': 30, 'data__source': 'none:'},
            r'distill: skip = 30; give a multiple of 20',
        ),
        ({'train__seed': -1}, r'train\.seed = -1; it must be at least 0 and at most 4294967295'),
        ({'preview__seed': 2**32}, r'preview\.seed = 4294967296; it must be at least 0'),
        ({'data__validation_batches': 0}, 'validation_batches = 0; it must be at least 1'),
        (
            {'train__decay': True, 'train__warmup': 6},
            r'train\.warmup = 6 of 6 steps; .* must be less',
        ),
        ({'objective': 'denoise'}, "'distance' is that to the base's pictures"),
        ({'train__remat': 'block'}, 'blocks'),
        ({'trains': 'full', 'full__trainable': 'to_quack'}, 'to_quack'),
        ({'mesh__fsdp': 3}, 'mesh'),
        ({'preview__sampler': 'ddmi'}, "did you mean 'ddim'"),
        ({'preview__prompts': ()}, r'preview\.prompts is empty; give one or more'),
        ({'preview__prompts': ('x ' * 99,)}, 'prompt of 101 tokens'),
        ({'data__validation': 'synthetic:3', 'train__best': 'validation'}, 'synthetic:3'),
        ({'preview__steps': 0}, 'steps = 0; ddim takes a whole number'),
        ({'train__caption_dropout': 1.5}, r'caption_dropout = 1\.5; .* at most 1'),
        (
            {'preview__teacher_steps': 1000},
            'preview.teacher_steps: steps = 1000; ddim takes a whole number',
        ),
        ({'data__source': 'synthetc:4'}, "did you mean 'synthetic'"),
    ],
)
def test_settings_outside_the_tables_are_refused(model, tmp_path, uncompiled, settings, said):
    with pytest.raises(InputError, match=said):
        runs.run(model, tmp_path / 'run', **settings)
    assert (
        not (tmp_path / 'run' / 'checkpoints').is_dir() or not runs.checkpoints(tmp_path / 'run')[0]
    )


def test_an_alpha_of_0_is_the_rank():
    c = runpy.run_path(str(runs.CONFIGS / 'default.py'))['get_config']().lora
    c.rank = 4
    assert [row[1:] for row in student.lora_targets(c)] == [(4, 4)]
    c.targets = (('.*to_q/kernel', 8, 0), ('.*to_k/kernel', 8, 2.0), ('.*', 0, 0))
    assert [row[1:] for row in student.lora_targets(c)] == [(8, 8), (8, 2.0), (0, 0)]


# --- the loss


def test_gradient_steps_lower_the_loss_towards_a_fixed_target(model):
    """The loss itself has a moving target and need not fall; with the target held, it must."""
    settings = {'distill.target': 'ema', 'data.cache': True}
    config = runs.config(model, settings)
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


def test_a_step_that_is_not_finite_changes_nothing(model, cached, poison, monkeypatch):
    poison([3])
    named = []
    monkeypatch.setattr(
        train.loop.Watch, 'add', lambda self, i, metrics, names, add=train.loop.Watch.add: (
            named.append(names), add(self, i, metrics, names)
        ),
    )  # fmt: skip
    runs.run(
        model,
        cached,
        data__cache=True,
        train__steps=5,
        train__save_every=1,
        train__keep=9,
    )
    bad = [i for i, names in enumerate(named, 1) if '00000003' in names]
    assert len(bad) == 1  # of an epoch
    (bad,), states = bad, [runs.state(cached, i) for i in range(1, 6)]
    assert [int(s['skipped']) for s in states] == [int(i >= bad) for i in range(1, 6)]
    assert [int(s['step']) for s in states] == [1, 2, 3, 4, 5]
    for i, (before, after) in enumerate(itertools.pairwise(states), 2):
        kept = [k for k in before if k not in ('step', 'skipped')]
        changed = [k for k in kept if before[k].tobytes() != after[k].tobytes()]
        assert bool(changed) == (i != bad), (i, changed)
    assert all(np.isfinite(x).all() for x in runs.exported(cached).values())


def test_many_such_steps_in_a_row_end_the_run(model, cached, poison, capsys):
    poison(range(40))
    with pytest.raises(InputError, match=r'3 steps in a row .* not finite; step 1: 0000\d{4}, '):
        runs.run(model, cached, data__cache=True, train__max_skipped=2)
    said = capsys.readouterr().out
    assert re.search(r'step 1 was skipped, loss or gradients are not finite: 0000\d{4}, ', said)


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

MORE = {'preview__prompts': ('a disc', 'a ring')}


@pytest.fixture(scope='module')
def short(model, tmp_path_factory):
    """The workdir of a run of 4 steps: 2 and 4 are saved."""
    workdir = tmp_path_factory.mktemp('short') / 'run'
    runs.run(model, workdir, train__steps=4)
    return workdir


@pytest.fixture
def stopped(short, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(short, tmp_path / 'run')


@pytest.fixture(scope='module')
def whole(model, tmp_path_factory):
    """The workdir of a run of 6 steps in one go."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    runs.run(model, workdir, train__steps=6, **MORE)
    return workdir


class Longer(NamedTuple):
    workdir: Path
    said: str
    new: list  # weak references to the arrays of the state that it started with
    alive: list  # those of them that were in memory when the old state was read


@pytest.fixture(scope='module')
def longer(model, short, tmp_path_factory):
    """The short run gone on with to 6 steps, with what may change -> Longer."""
    workdir = shutil.copytree(short, tmp_path_factory.mktemp('longer') / 'run')
    new, alive, said = [], [], io.StringIO()

    def place(*args, place=train.place):
        there = place(*args)
        new.extend(weakref.ref(x) for x in jax.tree.leaves(there.state))
        return there

    def restore(self, abstract, restore=train.Saves.restore):
        alive.extend(x for x in new if x() is not None)
        return restore(self, abstract)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(train, 'place', place)
        patch.setattr(train.Saves, 'restore', restore)
        runs.run(model, workdir, train__steps=6, train__keep=5, data__threads=2, **MORE)
    return Longer(workdir, said.getvalue(), new, alive)


def test_a_longer_run_goes_on(whole, longer):
    assert runs.first_step(longer.said) == 4
    runs.same(runs.state(whole), runs.state(longer.workdir))
    runs.same(runs.exported(whole), runs.exported(longer.workdir))
    assert runs.losses(whole) == runs.losses(longer.workdir) and len(runs.losses(whole)) == 6
    assert runs.checkpoints(longer.workdir)[0] == [2, 4, 6]


def test_the_learning_rate_is_the_one_that_a_step_took(whole):
    """Of 50 steps to warm up, the first is taken at 0."""
    rates = {x['step']: x['lr'] for x in runs.lines(whole) if 'lr' in x}
    assert rates == pytest.approx({i: 1e-3 * (i - 1) / 50 for i in range(1, 7)}, rel=1e-5)


def test_the_new_state_is_gone_before_the_old_one_is_read(longer):
    """Two of them would be the largest thing in memory."""
    assert longer.new and not longer.alive


def test_pictures_are_compared_with_those_of_the_same_settings(whole, longer):
    """Drawn again where preview.* has changed, here to another number of prompts."""
    assert 'it is drawn again' in longer.said
    workdirs = whole, longer.workdir
    runs.same(*(dict(np.load(w / 'preview' / 'references.npz')) for w in workdirs))
    last = [[x for x in runs.lines(w) if 'distance' in x][-1] for w in workdirs]
    assert last[0] == last[1]


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'train__lr': 1e-2}, r'train\.lr = 0\.001 \(now 0\.01\); go on with its settings'),
        ({'distill__w': '2:5'}, r"distill\.w = '2:4' \(now '2:5'\)"),
    ],
)
def test_another_recipe_is_refused(model, stopped, uncompiled, changes, said):
    with pytest.raises(InputError, match=said):
        runs.run(model, stopped, train__steps=6, **changes)


def test_an_unfinished_checkpoint_is_never_picked(model, whole, stopped, capsys):
    """Steps 2 and 4 are saved; 4 looks as it does when the process was killed while it wrote.

    Then 6 lacks the mark of its commit, as a copy does that was broken off.
    """
    folder = stopped / 'checkpoints'
    (folder / '4').rename(folder / '4.orbax-checkpoint-tmp')
    runs.run(model, stopped, train__steps=6)
    said = capsys.readouterr().out
    assert 'going on from step 2 ' in said and 'drawn again' not in said
    runs.same(runs.state(whole), runs.state(stopped))
    assert sorted(runs.losses(stopped)) == [1, 2, 3, 4, 5, 6]
    assert not runs.checkpoints(stopped)[1]
    (folder / '6' / 'commit_success.txt').unlink()
    runs.run(model, stopped, train__steps=6)
    said = capsys.readouterr().out
    assert 'checkpoints/6 is damaged' in said and 'going on from step 4 ' in said
    runs.same(runs.state(whole), runs.state(stopped))
    assert runs.losses(whole) == runs.losses(stopped)


def test_a_damaged_checkpoint_is_named(model, stopped, uncompiled):
    for file in stopped.glob('checkpoints/*/state/ocdbt.process_0/d/*'):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match='checkpoints/4 cannot be restored'):
        runs.run(model, stopped, train__steps=6)


def test_the_best_is_known_after_a_resume(model, stopped):
    """A worse one does not replace it."""
    first = runs.exported(stopped, 'lora_best')
    file = stopped / 'checkpoints' / '2' / 'metrics' / 'metrics'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'distance': 0.0}))
    runs.run(model, stopped, train__steps=8)
    runs.same(first, runs.exported(stopped, 'lora_best'))
    assert runs.checkpoints(stopped)[0] == [2, 6, 8]


def test_pictures_of_another_model_are_drawn_again(model, stopped, capsys):
    """A folder that a run was begun in by mistake: its references are no measure of another model."""
    file = stopped / 'preview' / 'references.npz'
    with np.load(file) as found:
        kept = dict(found)
    made_of = json.loads(str(kept['settings'])) | {'model': 'another'}
    np.savez(file, **kept | {'teacher': 0 * kept['teacher'], 'settings': json.dumps(made_of)})
    capsys.readouterr()
    runs.run(model, stopped, train__steps=8)
    assert f'{file} was drawn with another model' in capsys.readouterr().out
    with np.load(file) as found:
        assert all(np.array_equal(found[k], x) for k, x in kept.items())


def test_a_run_says_what_its_sources_leave_out(model, tmp_path, capsys):
    members = [m for i in range(8) for m in sample(f'{i}', size=(16, 16))]
    tar = tar_of(tmp_path / 'x.tar', [*members, *sample('9', caption='')])
    changes = {'data.source': f'wds:{tar}', 'data.validation': f'wds:{tar}', 'data.max_dropped': 1}
    config = runs.config(model, changes)
    mesh = sharding.make_mesh()
    feed.Feed(describe(str(model)), config, mesh, tmp_path / 'run').close()
    line = f'wds:{tar}: broken, by the index: 1 empty caption (first: x.tar/9)\n'
    assert capsys.readouterr().out == 2 * line


def test_a_run_tells_what_it_replaces_and_cuts(model, tmp_path, capsys):
    """When there is a new kind, after an epoch, and at the end."""
    members = [m for i in range(14) for m in sample(f'{i}', size=(16, 16))]
    bad = [
        (name, content[:60] if '.png' in name else content)
        for name, content in sample('bad', size=(40, 40))
    ]
    tar = tar_of(tmp_path / 'x.tar', [*members, *bad, *sample('long', caption='word ' * 99)])
    source = f'wds:{tar}'
    config = runs.config(model, {'data.source': source, 'data.max_dropped': 1})
    fed = feed.Feed(describe(str(model)), config, sharding.make_mesh(), tmp_path / 'run')
    batches = fed.batches(0)
    found = fed.loader.order(0)[1]  # of the first of an epoch's two batches
    replaced, cut = f'{source}: 1 broken samples were replaced: 1 picture', 'captions cut, of '
    said = [next(batches) and capsys.readouterr().out for _ in range(4)]
    assert (replaced in said[0], cut in said[0]) == (14 in found, 15 in found)
    assert replaced in said[0] + said[1] and f'{source}: {cut}' in said[0] + said[1]
    assert f'{cut}24: ' in said[2] and not said[3]
    fed.close()
    said = capsys.readouterr().out
    assert re.search(cut + r'32: \d longer than 77 tokens \(first: x.tar/long\)\n', said)


def test_a_run_that_fails_tells_it_too(model, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError('as it compiles')

    closed = []
    monkeypatch.setattr(train, 'Steps', fail)
    monkeypatch.setattr(feed.Feed, 'close', lambda self: closed.append(self))
    with pytest.raises(RuntimeError, match='as it compiles'):
        runs.run(model, tmp_path)
    assert len(closed) == 1


def test_a_consistency_model_is_no_teacher(model):
    """One that takes guidance, or one whose scheduler says so; but it is fine-tuned."""
    what, mesh = describe(str(model)), sharding.make_mesh(devices=jax.devices()[:1])
    config = runs.config(model)
    told = what.specs | {'unet': dataclasses.replace(what.specs['unet'], w_dim=8)}
    few = what.schedule._replace(few_steps=True)
    for specs, schedule in ((told, what.schedule), (what.specs, few)):
        with pytest.raises(InputError, match='is a consistency model, which is no teacher; give'):
            step.program(specs, what.family, schedule, config, mesh)
    step.program(told, what.family, few, runs.config(model, {'objective': 'lcf'}), mesh)


def test_models_for_inpainting_are_not_trained(model, tmp_path, uncompiled):
    folder = runs.write_tiny(tmp_path / 'inpainting', in_channels=9)
    with pytest.raises(InputError, match='its UNet takes 9 channels, latents have 4'):
        runs.run(folder, tmp_path / 'run')


@pytest.mark.parametrize('part', ['unet', 'vae', 'text_encoder'])
def test_other_weights_under_the_same_name_are_refused(model, stopped, uncompiled, part):
    said = rf"holds a run with weights\.{part} = '\w+' \(now '\w+'\)"
    with runs.other_weights(model, part), pytest.raises(InputError, match=said):
        runs.run(model, stopped, train__steps=6)


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
