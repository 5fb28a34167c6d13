"""The training loop: one compiled step with donated state, run to a step count, resumable.

A run is a function of its step number: keys are folded with it, batches are asked for by it. So the
state that is saved says all, and a run that was stopped goes on as if it had not been.
"""

import collections
import itertools
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from lcm_jax.errors import InputError
from lcm_jax.peers import all_come, meet


class State(NamedTuple):
    """Everything that a run resumes from."""

    step: jax.Array  # int32
    skipped: jax.Array  # int32: steps that were left out, as their gradients were not finite
    params: Any  # what is trained, float32
    ema: Any  # its running average, or None
    opt: Any  # optimizer state


class Stopped(Exception):
    """The run was asked to stop (SIGTERM), and has saved its state."""


def init(params, tx, ema_decay):
    """Trainable parameters -> State at step 0. The average starts as a copy, so both may be donated."""
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    return State(jnp.int32(0), jnp.int32(0), params, ema, tx.init(params))


def in_parts(fn, zero, batch, parts):
    """fn of a batch [B, ...], which must be a mean over samples, from parts taken one after the other.

    zero: zeros shaped as what fn gives.
    """
    if parts == 1:
        return fn(batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, fn(part)), None

    # Part i is the rows i, i + parts, ...: rows stay on the devices that they are on.
    cut = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    total, _ = jax.lax.scan(add, zero, cut)
    return jax.tree.map(lambda x: x / parts, total)


def make_step(loss, tx, ema_decay=0.0, accumulate=1):
    """loss(params, ema, frozen, batch, key) -> scalar  =>  step(state, frozen, batch, key), not jitted.

    The key is folded with the step inside. accumulate: parts that the batch is taken in, see
    `in_parts`. A step whose loss or gradients are not finite changes nothing but the counts. The
    average's decay warms up as min(ema_decay, (1 + step) / (10 + step)); ema_decay 0: there is none.
    """

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)

        def gradients(part):
            return jax.value_and_grad(loss)(state.params, state.ema, frozen, part, key)

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
        value, grads = in_parts(gradients, zero, batch, accumulate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)

        def updated(params, ema, opt):
            updates, opt = tx.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
            if ema_decay:
                decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
                ema = optax.incremental_update(params, ema, 1 - decay)
            return params, ema, opt

        def branch(*old):
            return jax.lax.cond(finite, updated, lambda *old: old, *old)

        def select(*old):
            return jax.tree.map(partial(jnp.where, finite), updated(*old), old)

        # To choose number by number XLA on CPUs holds a copy of the moments from the step's start. A
        # branch, as in optax.apply_if_finite, moves a third more bytes on TPUs (SD 1.5 on v5e: 71 GB
        # against 53).
        old = state.params, state.ema, state.opt
        kept = jax.lax.platform_dependent(*old, cpu=branch, default=select)
        metrics = {'loss': value, 'grad_norm': norm, 'finite': finite}
        return State(state.step + 1, state.skipped + ~finite, *kept), metrics

    return step


METRICS = 'loss', 'grad_norm'  # of a step


class Watch:
    """Follows the steps' results from one step behind, so that the device never waits for it."""

    def __init__(self, most, skipped=0, behind=1):
        self.most, self.behind = most, behind  # steps in a row that may be skipped
        self.pending, self.bad, self.good = collections.deque(), [], []
        self.skipped = skipped  # in all

    def add(self, step, metrics, names):
        self.pending.append((step, metrics, names))
        while len(self.pending) > self.behind:
            self._read()

    def wait(self):
        """Until all steps are done."""
        while self.pending:
            self._read()

    def means(self):
        """Wait for all steps -> means of the finite ones since the last call, and all skipped so far."""
        self.wait()
        good, self.good = self.good, []
        means = {k: sum(m[k] for m in good) / len(good) for k in METRICS} if good else {}
        return means | {'skipped': self.skipped}

    def _read(self):
        step, metrics, names = self.pending.popleft()
        if metrics['finite']:
            self.good.append({name: float(metrics[name]) for name in METRICS})
            self.bad = []
            return
        self.skipped += 1
        self.bad.append((step, names))
        said = ', '.join(names[:4])  # of this process: each names its own
        print(f'step {step} was skipped, loss or gradients are not finite: {said}', flush=True)
        if len(self.bad) > self.most:
            raise InputError(
                f'{len(self.bad)} steps in a row had a loss or gradients that are not finite; '
                + '; '.join(f'step {i}: {", ".join(names[:4])}' for i, names in self.bad[-3:])
            )


def nothing(i, state):
    """An on_save, see `fit`, that measures and writes nothing."""
    return {}, lambda: None


def save(i, state, saves, on_save):
    """Save the state with the metrics of on_save, see `fit`; should that fail, without them, and raise.

    It is lost only where one of several processes fails alone in what they do together: the others
    wait for it there, and cannot save.
    """
    try:
        metrics, write = on_save(i, state)
    except Exception:
        if all_come('on_save has failed'):
            saves.save(i, state, {})
        raise
    kept = {}
    try:
        write()
        kept = metrics
    finally:
        meet('written')  # the first writes the most, and orbax waits for it for five minutes only
        saves.save(i, state, kept)


def fit(
    step,
    state,
    frozen,
    batches,
    key,
    *,
    steps,
    saves,
    log,
    save_every,
    log_every,
    stop=lambda step: False,
    max_skipped=10,
    on_save=nothing,
    label='train',
):
    """Run `step` from the state's own step until `steps` -> State.

    step: compiled, (state, frozen, batch, key) -> (state, metrics). batches(i) -> iterator of
    (batch, names of its samples) from step i on. saves: a `saves.Saves`; on_save(i, state) -> metrics
    that go with the checkpoint, which all processes find together, and write(), which each then calls
    for itself. log(i, metrics, seconds, waited) gets the means of `log_every`
    steps: seconds of one, and its part spent waiting for data. stop(i): whether to save, and raise
    Stopped. Raises InputError if more than `max_skipped` steps in a row are not finite.
    """
    start = int(state.step)
    if start >= steps:
        return state
    watch, stream = Watch(max_skipped, int(state.skipped)), batches(start)
    began, waited, since = time.perf_counter(), 0.0, start
    every = 1 if sys.stderr.isatty() else 30  # seconds; a log keeps each
    quiet = jax.process_index() > 0
    options = {'desc': label, 'unit': 'it', 'mininterval': every, 'disable': quiet}
    with tqdm(total=steps, initial=start, **options) as bar:
        for i in itertools.count(start + 1):
            asked = time.perf_counter()
            batch, names = next(stream)
            waited += time.perf_counter() - asked
            state, metrics = step(state, frozen, batch, key)
            watch.add(i, metrics, names)
            bar.update()
            if i % log_every == 0 or i == steps:
                metrics, n = watch.means(), i - since
                log(i, metrics, (time.perf_counter() - began) / n, waited / n)
                shown = {k: f'{metrics[k]:.4f}' for k in METRICS[:1] if k in metrics}
                bar.set_postfix(shown, refresh=False)
                began, waited, since = time.perf_counter(), 0.0, i
            stopping, due = stop(i), i % save_every == 0 or i == steps
            if due or stopping:
                watch.wait()
                save(i, state, saves, on_save if due else nothing)
                began, waited, since = time.perf_counter(), 0.0, i
            if i == steps:
                return state
            if stopping:
                raise Stopped(f'step {i}')
