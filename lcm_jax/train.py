"""Distil, fine-tune or adapt a model.

    python -m lcm_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]

KEY is one of configs/default.py, such as train.steps; DIR is for checkpoints, logs, pictures and
what is trained. Run the same command again to go on. On several machines, run it on each: TPU pods,
GKE, Slurm and Open MPI are recognised; elsewhere add --coordinator=HOST:PORT --processes=N
--process=I (or --coordinator=auto).
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lcm_jax import loop, sharding
from lcm_jax.conditioning import encode_text
from lcm_jax.data.cache import write_cache
from lcm_jax.data.loader import loader
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.encode import encoder
from lcm_jax.errors import InputError, choose
from lcm_jax.export import export
from lcm_jax.logs import Writer, memory, say, size
from lcm_jax.model import describe
from lcm_jax.preview import Preview
from lcm_jax.saves import Saves, on_host
from lcm_jax.step import DTYPES, cached, program, without_sizes
from lcm_jax.stop import Stop
from lcm_jax.tree import count, named

NULLS = {'model': None, 'empty': False, 'zeros': True}  # whether zeros; None: as the model was trained


def run(config, workdir):
    """A whole run from a config -> path of what it exports. Resumes from `workdir`.

    Raises InputError for bad settings and data, and loop.Stopped after SIGTERM, its state saved.
    """
    workdir = Path(workdir).resolve()
    model = describe(config.model)
    mesh = sharding.make_mesh(**{k: config.mesh[k] for k in ('data', 'fsdp', 'tensor', 'dcn')})
    prog = program(model.specs, model.family, model.schedule, config, mesh)
    told = Conditions(model, config)
    data = Data(model, config, mesh, workdir, told)
    frozen, state = place(model, prog, mesh, config, told)
    step = Steps(prog, frozen, config.train.seed, mesh)
    preview = Preview(
        model, prog, mesh, config.preview, told.prompts, told.vae, data.size, workdir / 'preview.npz'
    )
    c = config.train
    with Saves(workdir / 'checkpoints', config.to_dict(), keep=c.keep, best=c.best) as saves:
        resumed = saves.restore(prog.state)
        if resumed is None:
            preview.references(state.params, frozen)
            describe_run(config, prog, mesh, data)
        else:
            preview.references(state.params, frozen)
            say(f'going on from step {int(resumed.step)} in {workdir}')
        state = state if resumed is None else resumed
        with Writer(workdir, int(state.step)) as writer, Stop() as stop:

            def finish(name, state):
                chosen = state.ema if config.export.weights == 'ema' else state.params
                trained = on_host(chosen)
                if jax.process_index() == 0:
                    out = export(workdir / name, trained, model, prog.student, config)
                    say(f'wrote {out}')
                    return out

            def on_save(i, state):
                chosen = state.ema if config.export.weights == 'ema' else state.params
                picture, metrics = preview(chosen, frozen)
                metrics |= data.validate(state, frozen)
                writer.picture(i, 'preview', picture)
                writer.scalars(i, metrics)
                if saves.improves(metrics):
                    finish(f'{config.export.name}_best', state)
                return metrics

            state = loop.fit(
                step,
                state,
                frozen,
                data.batches,
                step.key,
                steps=c.steps,
                saves=saves,
                log=lambda *args: report(writer, prog, step, config, *args),
                save_every=c.save_every,
                log_every=c.log_every,
                stop=stop,
                max_skipped=c.max_skipped,
                on_save=on_save,
                label=config.objective,
            )
            return finish(config.export.name, state)
