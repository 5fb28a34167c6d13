"""The trainer's loop for the parts of the emoji family that no config trains: one device, data in memory."""

import itertools
from pathlib import Path

import jax

from lcm_jax import loop
from lcm_jax.logs import Writer
from lcm_jax.saves import Saves


def train(loss, tx, params, frozen, batch_at, args, *, ema_decay, save_every, log_every=20, report):
    """Run to args.steps from the newest checkpoint in args.workdir, if there is one -> State.

    loss(params, ema, frozen, batch, key) -> scalar; batch_at(i) -> the batch of step i, from 0;
    report(i, state) -> metrics, after each checkpoint. args are the script's, and make the run.
    """
    recipe = {k: v for k, v in vars(args).items() if k not in ('workdir', 'out')}
    step = jax.jit(loop.make_step(loss, tx, ema_decay), donate_argnums=0)
    state = loop.init(params, tx, ema_decay)
    with Saves(Path(args.workdir) / 'checkpoints', recipe) as saves:
        state = saves.restore(jax.eval_shape(lambda: state)) or state
        with Writer(args.workdir, int(state.step)) as writer:

            def on_save(i, state):
                metrics = report(i, state)

                def write():
                    writer.scalars(i, metrics)
                    print(f'\nstep {i}: {metrics}', flush=True)

                return metrics, write

            return loop.fit(
                step,
                state,
                frozen,
                lambda start: ((batch_at(i), ()) for i in itertools.count(start)),
                jax.random.key(1),
                steps=args.steps,
                saves=saves,
                log=lambda i, metrics, *_: writer.scalars(i, metrics),
                save_every=save_every,
                log_every=log_every,
                on_save=on_save,
            )
