"""The training loop: one jitted step with donated state, run to a step count, resumable."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter
from tqdm import tqdm


class State(NamedTuple):
    """Everything that a run resumes from."""

    step: jax.Array  # int32
    params: Any  # what is trained, float32
    ema: Any  # its running average (`params` itself is averaged in with weight 1 - decay)
    opt: Any  # optimizer state


def init(params, tx):
    """Trainable parameters -> State at step 0. The average starts as a copy, so both may be donated."""
    return State(jax.numpy.int32(0), params, jax.tree.map(jax.numpy.copy, params), tx.init(params))


def make_step(loss, tx, ema_decay):
    """loss(params, ema, frozen, batch, key) -> (scalar, metrics)  =>  step(state, frozen, batch, key).

    The key is folded with the step inside, so a resumed run draws what the uninterrupted one would.
    The average's decay warms up as min(ema_decay, (1 + step) / (10 + step)).
    """

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = grad(state.params, state.ema, frozen, batch, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jax.numpy.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        metrics = {'loss': value, 'grad_norm': optax.tree.norm(grads), **metrics}
        return State(state.step + 1, params, ema, opt), metrics

    return jax.jit(step, donate_argnums=0)


def fit(
    step,
    state,
    frozen,
    batch_at,
    key,
    *,
    steps,
    workdir,
    save_every,
    log_every=20,
    on_save=None,
    label='train',
):
    """Run `step` until `steps`, from the newest checkpoint in `workdir` if there is one -> State.

    batch_at(i) gives the batch of step i. Metrics go to the progress bar and to TensorBoard in
    `workdir`; on_save(i, state, writer) is called after each checkpoint and at the end.
    """
    workdir = Path(workdir).resolve()
    manager = ocp.CheckpointManager(
        workdir / 'checkpoints', options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    start = int(state.step)
    with (
        SummaryWriter(str(workdir)) as writer,
        tqdm(total=steps, initial=start, desc=label, unit='it', mininterval=1) as bar,
    ):
        for i in range(start, steps):
            state, metrics = step(state, frozen, batch_at(i), key)
            bar.update()
            if (i + 1) % log_every == 0:
                metrics = {name: float(value) for name, value in metrics.items()}
                bar.set_postfix(loss=f'{metrics["loss"]:.4f}')
                for name, value in metrics.items():
                    writer.add_scalar(name, value, i + 1)
            if (i + 1) % save_every == 0 or i + 1 == steps:
                manager.save(i + 1, args=ocp.args.StandardSave(state))
                if on_save:
                    on_save(i + 1, state, writer)
    manager.wait_until_finished()
    manager.close()
    return state
