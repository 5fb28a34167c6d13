"""Distil, fine-tune or adapt a model.

    python -m lcm_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]

KEY is one of configs/default.py, such as train.steps; DIR is for checkpoints, logs, pictures and
what is trained. The same command again goes on where it was stopped. On several machines, run it on
each: GKE, Slurm and Open MPI are recognised by their environment; on Cloud TPU pods add
--coordinator=auto, elsewhere --coordinator=HOST:PORT --processes=N --process=I.
"""

import math
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import aot, flags, loop, processes, sharding
from lcm_jax.conditioning import encode_text, micro_conditioning
from lcm_jax.export import check_name, export
from lcm_jax.feed import Feed
from lcm_jax.flops import flops
from lcm_jax.logs import Meter, Writer, say, summary
from lcm_jax.model import describe
from lcm_jax.models.shapes import DTYPES
from lcm_jax.peers import Peers, meet
from lcm_jax.preview import Preview
from lcm_jax.saves import Saves, flat, on_host
from lcm_jax.step import NULLS, program
from lcm_jax.stop import Stop

OWN = 'data.threads', 'data.workers'  # settings that each process may have its own of
STOPPED = 143  # exit status after SIGTERM, by which clusters know that the run shall go on


def run(config, workdir):
    """A whole run from a config -> path of what it exports. Resumes from `workdir`.

    Raises InputError for bad settings and data, and loop.Stopped after SIGTERM, its state saved.
    """
    workdir, c = Path(workdir).resolve(), config.train
    check_name(config.export.name)
    model = describe(config.model)
    recipe = config.to_dict() | {'weights': model.marks(model.specs)}
    processes.alike('settings', {k: x for k, x in flat(recipe).items() if k not in OWN})
    mesh = sharding.make_mesh(**{k: config.mesh[k] for k in ('data', 'fsdp', 'tensor', 'dcn')})
    prog = program(model.specs, model.family, model.schedule, config, mesh)
    for tokenizer in model.tokenizers:
        tokenizer(list(config.preview.prompts))  # raises InputError before hours are spent
    feed = Feed(model, config, mesh, workdir)
    recipe |= {'samples': feed.samples['source']}
    with closing(feed), Saves(workdir / 'checkpoints', recipe, keep=c.keep, best=c.best) as saves:
        step = Steps(prog, mesh, c.seed, feed.size)  # before the weights take the memory
        there = place(model, prog, config, mesh, feed.size)
        state, there = there.state, there._replace(state=None)
        preview = Preview(
            model,
            prog,
            mesh,
            config.preview,
            told=there.told,
            vae=there.vae,
            size=feed.size,
            file=workdir / 'preview' / 'references.npz',
            made_of={k: recipe[k] for k in ('model', 'weights', 'dtype', 'vae_dtype')}
            | {'null': config.distill.null},
        )
        preview.references(state.params, there.frozen)
        if saves.step is not None:
            state = None  # so that there are never two in memory
            state = saves.restore(prog.state)
        say(summary(prog, mesh, config, feed))
        if saves.step is not None:
            say(f'going on from step {int(state.step)} in {workdir}')
        with Writer(workdir, int(state.step)) as writer, Stop(int(state.step)) as stop:
            out = Outputs(config, model, prog, feed, preview, step, saves, writer, workdir)
            meter = Meter(writer, prog.rate, c.batch, step.flops(feed.size))
            state = loop.fit(
                step,
                state,
                there.frozen,
                feed.batches,
                step.key,
                steps=c.steps,
                saves=saves,
                log=meter.report,
                save_every=c.save_every,
                log_every=c.log_every,
                stop=stop,
                max_skipped=c.max_skipped,
                on_save=lambda i, state: out.on_save(i, state, there.frozen),
                label=config.objective,
            )
            file = out.export(config.export.name, on_host(out.chosen(state)))
            meet('exported')  # JAX lets no process end long before the others
            return file


class There(NamedTuple):
    """What a run starts from, on its devices."""

    frozen: dict  # as the Program says
    state: loop.State
    told: dict  # the preview's conditions {'cond', 'null'}, [N, ...] each in numpy
    vae: dict  # parameters in numpy: pictures are decoded now and then


def place(model, prog, config, mesh, size):
    """Read the model and start the state -> There; size: (height, width) px of the preview's pictures.

    What encodes is kept only if the step asks it.
    """
    dtypes = dict.fromkeys(model.specs, DTYPES[config.dtype]) | {'vae': DTYPES[config.vae_dtype]}
    encoders = model.load(model.encoders, dtypes)
    told = conditions(model, encoders, config, size)
    null = {k: x[:1] for k, x in told['null'].items() if k != 'sizes'}
    vae = jax.device_get(encoders.pop('vae'))
    del encoders
    homes = sharding.homes(prog.frozen)
    kept = [part for part in model.specs if part in prog.frozen]
    frozen = model.load(kept, dtypes, {part: homes[part] for part in kept})
    frozen['null'] = jax.tree.map(sharding.put, null, homes['null'])
    base = frozen.get('unet')
    rounded = not prog.student.alphas and dtypes['unet'] != jnp.float32
    if base is None or rounded:  # what is trained starts as precise as the file
        home = homes.get('unet', sharding.replicated(mesh))
        base = model.load(['unet'], dtypes | {'unet': jnp.float32}, {'unet': home})['unet']

    def start(seed, base):
        params = prog.student.init(jax.random.key(seed), base)
        return loop.init(params, prog.tx, config.train.ema_decay)

    start = jax.jit(start, out_shardings=sharding.homes(prog.state))
    return There(frozen, start(np.uint32(config.train.seed), base), told, vae)


def conditions(model, params, config, size):
    """The preview's prompts, for pictures of size (height, width) px, and the null condition.

    -> {'cond', 'null'}, [N, ...] each in numpy.
    """
    parts = model.family.text_encoders
    specs, tokenizers = tuple(model.specs[part] for part in parts), model.tokenizers

    def read(prompts):
        ids = tuple(tokenizer(prompts) for tokenizer in tokenizers)
        return jax.device_get(encode_text(specs, tuple(params[part] for part in parts), ids))

    prompts = list(config.preview.prompts)
    cond, null = read(prompts), read([''])
    zero = NULLS[config.distill.null]
    if zero is None:
        zero = model.family.zero_null
    null = {k: np.repeat(np.zeros_like(x) if zero else x, len(prompts), 0) for k, x in null.items()}
    if model.specs['unet'].size_dim:
        sizes = np.tile(micro_conditioning(size, (0, 0), size), (len(prompts), 1))
        cond, null = cond | {'sizes': sizes}, null | {'sizes': sizes}
    return {'cond': cond, 'null': null}


class Steps:
    """The compiled step: one program for each shape of batch, as it comes. Also the run's key.

    size: (height, width) of pictures whose program is compiled at once.
    """

    def __init__(self, prog, mesh, seed, size):
        whole = sharding.replicated(mesh)
        make = jax.jit(lambda seed: jax.random.key(seed), out_shardings=whole)
        self.key, self.whole, self.prog = make(np.uint32(seed)), whole, prog
        self.programs = {}
        self.compiled(prog.batch(size))

    def compiled(self, batch):
        """The program for batches of these shapes."""
        shapes = tuple(sorted((name, x.shape) for name, x in batch.items()))
        if shapes not in self.programs:
            prog = self.prog
            batch = {
                k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                for k, x in batch.items()
            }
            self.programs[shapes] = aot.compiled(
                prog.step,
                *(prog.state, prog.frozen, batch, self.key),
                donate_argnums=0,
                out_shardings=(sharding.homes(prog.state), self.whole),
            )
            meet('compiled')
        return self.programs[shapes]

    def __call__(self, state, frozen, batch, key):
        return self.compiled(batch)(state, frozen, batch, key)

    def flops(self, size):
        """Floating-point operations of a step with pictures of size (height, width), all devices."""
        prog = self.prog
        args = prog.state, prog.frozen, prog.batch(size), self.key
        return flops(prog.step, *args, platform=jax.default_backend())


class Outputs:
    """What a run leaves behind: pictures and metrics at each checkpoint, and exported files."""

    def __init__(self, config, model, prog, feed, preview, step, saves, writer, workdir):
        self.config, self.model, self.prog, self.preview = config, model, prog, preview
        self.saves, self.writer, self.workdir, self.key = saves, writer, workdir, step.key
        there = any(workdir.glob(f'{config.export.name}_best*'))  # the name may have changed
        if not processes.anywhere(there):
            saves.best = math.inf
        self.held = feed.validation()
        self.loss = jax.jit(prog.loss, out_shardings=step.whole)

    def chosen(self, state):
        return state.ema if self.config.export.weights == 'ema' else state.params

    def on_save(self, i, state, frozen):
        """-> metrics, write(): of the pictures, the metrics, and what is the best so far."""
        chosen = self.chosen(state)
        picture, metrics = self.preview(chosen, frozen)
        if self.held:
            losses = [
                self.loss(chosen, chosen, frozen, batch, jax.random.fold_in(self.key, j))
                for j, batch in enumerate(self.held)
            ]
            metrics['validation'] = float(np.mean([np.asarray(x) for x in losses]))
        best = on_host(chosen) if self.saves.improves(metrics) else None

        def write():
            self.writer.picture(i, 'preview', picture)
            self.writer.scalars(i, metrics)
            if best is not None:
                self.export(f'{self.config.export.name}_best', best)

        return metrics, write

    def export(self, name, trained):
        """Arrays of `on_host` -> path, written by the first process."""
        if jax.process_index():
            return None
        out = export(self.workdir / name, trained, self.model, self.prog.student, self.config)
        say(f'wrote {out}')
        return out


def start(config, workdir, cluster):
    """`run` as a program: joins the other processes; after SIGTERM the status is 143."""
    processes.start_distributed(**cluster)
    try:
        with Peers(expected=(loop.Stopped,)):
            run(config, workdir)
    except loop.Stopped as e:
        say(f'stopped by SIGTERM, saved at {e}; the same command goes on from there')
        sys.exit(STOPPED)


def main(argv=None):
    """Run the command line."""
    flags.program(start, 'train', __doc__, argv)


if __name__ == '__main__':
    main()
