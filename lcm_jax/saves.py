"""Checkpoints of a run: written beside the training, whole or not at all, restored on any mesh."""

import contextlib
import logging
import math
import shutil
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep_policy

from lcm_jax.errors import InputError, first_line
from lcm_jax.logs import say
from lcm_jax.loop import Stopped
from lcm_jax.orbax_io import fault
from lcm_jax.peers import meet

# Keys of a config that may change when a run goes on; all others make it another run. So does
# train.steps with train.decay, as the rates depend on it.
MAY_CHANGE = (
    *('mesh', 'preview', 'export', 'data.threads', 'data.workers', 'data.max_dropped'),
    *('data.validation', 'data.validation_batches'),
    *('train.steps', 'train.log_every', 'train.save_every', 'train.keep', 'train.best'),
    *('train.max_skipped', 'train.remat', 'train.accumulate'),
)

MEASURED = {  # metric -> keys that it depends on, of those that may change
    'validation': ('data.validation', 'data.validation_batches'),
    'distance': ('preview',),
}
FOUND = ('weights', 'samples')  # in a recipe beside the config; older checkpoints lack some of it


def under(key, names):
    """Whether a key such as 'train.lr' is one of these, or inside one."""
    return any(key == name or key.startswith(name + '.') for name in names)


def flat(recipe, prefix=''):
    """Nested dict -> {'train.lr': value}, tuples as lists, as JSON gives them back."""
    out = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            out |= flat(value, f'{prefix}{key}.')
        else:
            out[prefix + key] = _plain(value)
    return out


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def set_aside(folder):
    """Rename the damaged checkpoints in a folder to STEP.damaged-TIME, and say so of each.

    Raises InputError, and renames none, if no other is left: a run would start anew beside it.
    """
    steps = sorted((p for p in folder.glob('*') if p.name.isdigit()), key=lambda p: int(p.name))
    faults = {step: fault(step, trees=('state',), records=('recipe',)) for step in steps}
    damaged = [step for step in steps if faults[step]]
    if damaged and damaged == steps:
        raise InputError(
            f'{steps[-1]} cannot be restored: {faults[steps[-1]]}; there is no older checkpoint to go '
            'on from: to start from the beginning, take it away'
        )
    for step in damaged:
        aside = step.rename(f'{step}.damaged-{time.time_ns()}')
        say(f'{step} is damaged: {faults[step]}; it is left out, as {aside.name}')


def check_renames(folder):
    """InputError where folders cannot be made and renamed, as every checkpoint is once it is whole."""
    probe, moved = (folder / f'.probe-{name}' for name in ('new', 'moved'))
    try:
        for one in (probe, moved):  # of a run that was killed
            shutil.rmtree(one, ignore_errors=True)
        probe.mkdir(parents=True)
        (probe / 'file').write_bytes(b'x')
        probe.rename(moved)
        shutil.rmtree(moved)
    except OSError as e:
        raise InputError(
            f'{folder}: checkpoints cannot be kept there, as folders cannot be made or renamed ({e}); '
            'a bucket must be mounted so that they can: gcsfuse --rename-dir-limit=1000, or one with '
            'a hierarchical namespace'
        ) from e


class Best(keep_policy.PreservationPolicy):
    """Keeps the checkpoint of the lowest value(step, metrics), the first of several; none of inf."""

    def __init__(self, value):
        self.value = value

    def should_preserve(self, checkpoints, *, context):
        values = {x.step: self.value(x.step, x.metrics) for x in checkpoints}
        best = min(values, key=values.get, default=None)
        return [x.step == best and values[best] < math.inf for x in checkpoints]


class Saves:
    """The checkpoints in a folder: the newest `keep`, and the best by the metric `best`, if any.

    recipe: the run's config, {'train': {'lr': value}, ...}, and what its model's weights and its
    samples are known by, {'weights': ..., 'samples': ...}; kept beside the state. Every process
    calls `save`. Raises InputError when what is there is of another recipe, or all of it damaged, and for a
    folder in which none can be renamed.
    """

    def __init__(self, folder, recipe, *, keep=2, best=''):
        self.folder, self.recipe, self.metric = Path(folder).resolve(), flat(recipe), best
        self.strange = set()  # steps whose metrics are not comparable with those of now
        if jax.process_index() == 0:
            check_renames(self.folder)
            set_aside(self.folder)
        meet('checkpoints')  # the others look after that
        policies = [keep_policy.LatestN(keep)]
        if best:
            policies.append(Best(self._value))
        logging.getLogger('absl').setLevel(logging.ERROR)  # a page for every checkpoint
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep_policy.AnyPreservationPolicy(policies),
                best_fn=lambda _: 0.0,  # without it metrics are not written
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                'state': ocp.StandardCheckpointHandler(),
                'recipe': ocp.JsonCheckpointHandler(),
            },
        )
        if self.step is not None:
            self._same(self._recipe_of(self.step))
        steps = self.manager.all_steps()
        self.strange = {step for step in steps if not self._measured_alike(step)}
        self.best = min((self._value(i, self.manager.metrics(i)) for i in steps), default=math.inf)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind in (None, Stopped) or jax.process_count() == 1:
            self.manager.wait_until_finished()
            self.manager.close()
            return
        with contextlib.suppress(Exception):  # the error that ends the run is the one to be told
            self.manager.wait_until_finished()  # the others' threads write on: `Peers` ends them later

    def _value(self, step, metrics):
        """The lower, the better; inf without the metric, or where it is not a number or not comparable."""
        value = math.inf if step in self.strange else (metrics or {}).get(self.metric, math.inf)
        return math.inf if math.isnan(value) else value

    def _measured_alike(self, step):
        """Whether a checkpoint's metric was found with the settings of now, and the best chosen by it."""
        before, now = self._recipe_of(step), self.recipe
        names = ('export.weights', 'train.best', *MEASURED.get(self.metric, ()))
        return all(before.get(k) == now[k] for k in now if under(k, names))

    def _recipe_of(self, step):
        args = ocp.args.Composite(recipe=ocp.args.JsonRestore())
        return self.manager.restore(step, args=args)['recipe']

    @property
    def step(self):
        """The newest, or None if there is none."""
        return self.manager.latest_step()

    def restore(self, abstract):
        """The newest state, placed as `abstract` says (ShapeDtypeStructs), or None if there is none."""
        step = self.step
        if step is None:
            return None
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self.manager.restore(step, args=args)['state']
        except Exception as e:  # of many types, from orbax and tensorstore
            said = f'{self.folder / str(step)} cannot be restored: {first_line(e)}'
            raise InputError(said) from e

    def _same(self, before):
        now = self.recipe

        def fixed(key):
            if key == 'train.steps' and now.get('train.decay'):
                return True
            return not under(key, MAY_CHANGE) and (key in before or not under(key, FOUND))

        keys = [k for k in {**now, **before} if fixed(k) and now.get(k) != before.get(k)]
        if keys:
            why = ', from which train.decay takes the rates' if keys == ['train.steps'] else ''
            raise InputError(
                f'{self.folder.parent} holds a run with '
                + ', '.join(f'{k} = {before.get(k)!r} (now {now.get(k)!r})' for k in keys[:3])
                + f'{why}; go on with its settings, or give another workdir'
            )

    def save(self, step, state, metrics):
        """Copy the state and write it in the background."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), recipe=ocp.args.JsonSave(self.recipe)
        )
        self.manager.save(step, args=args, metrics=metrics)

    def improves(self, metrics):
        """Whether these metrics are the best so far; they are then."""
        value = self._value(None, metrics)
        better = value < self.best
        self.best = min(self.best, value)
        return better


def on_host(tree):
    """Arrays, perhaps spread over processes -> numpy arrays, whole on each."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
