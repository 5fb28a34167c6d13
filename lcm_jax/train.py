"""Distil an LCM-LoRA.

    python -m lcm_jax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]

KEY is one of configs/default.py, such as train.steps; DIR is for checkpoints, logs and the LoRA.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lcm_jax import distill, loop, samplers
from lcm_jax import lora as L
from lcm_jax.data.emoji import emoji, to_float
from lcm_jax.data.order import shuffled
from lcm_jax.errors import InputError, choose
from lcm_jax.lora_files.files import write_lora
from lcm_jax.models.vae import VAE
from lcm_jax.pipeline import Pipeline
from lcm_jax.tree import count

PROMPTS = (  # drawn at each checkpoint
    'red heart, emotion, heart, love, red, noto emoji',
    'cat face, animal, cat, face, kitten, kitty, pet, twemoji',
    'strawberry, berry, fruit, noto emoji',
    'avocado, food, fruit, twemoji',
)


class Cache(NamedTuple):
    """A training set, encoded once."""

    mean: jax.Array  # [N,h,w,C] of the latents' posterior, unscaled
    std: jax.Array  # [N,h,w,C]
    cond: dict[str, jax.Array]  # the captions' conditions (see `conditioning`), [N, ...] each
    null: dict[str, jax.Array]  # the null condition, [1, ...] each


def batched(fn, x, batch=64):
    """fn over the rows of x in batches of one shape -> numpy tree."""
    padded = np.concatenate([x, np.repeat(x[:1], -len(x) % batch, 0)])
    parts = [jax.tree.map(np.asarray, fn(b)) for b in np.split(padded, len(padded) // batch)]
    return jax.tree.map(lambda *ys: np.concatenate(ys)[: len(x)], *parts)


def encode_pictures(spec, params, pictures):
    """pictures [N,H,W,3] uint8 -> mean, std [N,h,w,C] of their latents."""
    encode = jax.jit(lambda x: VAE(spec).apply({'params': params}, x, method='encode'))
    mean, logvar = batched(lambda x: encode(to_float(x)), pictures)
    return mean, np.exp(0.5 * logvar)


def encode_captions(read, captions):
    """[N] str -> their conditions, [N, ...] each in numpy; read does it for a list of any length."""
    return batched(lambda some: read(some.tolist()), np.array(captions, object))


def encode(pipe, samples):
    """[Sample] -> Cache on the device, by the pipeline's own VAE and text encoders."""
    pictures = np.stack([s.picture for s in samples])
    mean, std = encode_pictures(pipe.specs['vae'], pipe.params['vae'], pictures)
    cond = encode_captions(pipe.encode_text, [s.caption for s in samples])
    sizes = pipe.sizes(pictures.shape[1:3])
    cond |= {k: np.repeat(x, len(samples), 0) for k, x in sizes.items()}
    return jax.tree.map(jnp.asarray, Cache(mean, std, cond, pipe.encode_null() | sizes))


def make_loss(pipe, *, scale, target, solver_steps, w_range, distance, huber_c):
    """The distillation loss as `loop.make_step` takes it; frozen = (base UNet parameters, Cache).

    Student and target are the base with an adapter, the teacher the base alone: one copy of it.
    """
    choose('distance', distance, distill.DISTANCES)
    pick = choose(
        'target', target, {'student': lambda params, ema: params, 'ema': lambda params, ema: ema}
    )

    def loss(params, ema, frozen, samples, key):
        base, cache = frozen
        keys = jax.random.split(key)
        draws = distill.draw(
            keys[0],
            samples,
            cache.mean.shape[1:],
            steps=solver_steps,
            total=len(pipe.schedule.abar),
            w_range=w_range,
        )
        posterior = jax.vmap(
            lambda i: jax.random.normal(jax.random.fold_in(keys[1], i), cache.mean.shape[1:])
        )
        z = pipe.specs['vae'].scaling_factor * (
            cache.mean[samples] + cache.std[samples] * posterior(samples)
        )
        cond = jax.tree.map(lambda x: x[samples], cache.cond)
        null = jax.tree.map(lambda x, c: jnp.broadcast_to(x, c.shape), cache.null, cond)
        batch = {'z': z, 'cond': cond, 'null': null}

        def teacher(z, t, **cond):
            return pipe.net(base, z, t, **cond)

        student, goal = (L.apply(teacher, lora, scale) for lora in (params, pick(params, ema)))
        return distill.lcm_loss(
            student,
            goal,
            teacher,
            batch,
            draws,
            pipe.schedule.abar,
            solver=samplers.ddim(),
            kind=pipe.schedule.prediction_type,
            distance=distance,
            huber_c=huber_c,
        ), {}

    return loss


def distil(
    pipe,
    cache,
    *,
    rank,
    alpha,
    targets,
    solver_steps,
    w_min,
    w_max,
    distance,
    huber_c,
    target,
    steps,
    batch,
    lr,
    warmup,
    decay,
    weight_decay,
    clip,
    ema_decay,
    seed,
    data_seed,
    log_every,
    save_every,
    weights,
    workdir,
):
    """Distil an adapter from the pipeline's UNet -> adapter with its scale alpha / rank baked in.

    The keywords are the keys of configs/default.py. Resumes from `workdir`.
    """
    pick = choose('export.weights', weights, {'params': lambda s: s.params, 'ema': lambda s: s.ema})
    base = pipe.params['unet']
    lora = L.init(jax.random.key(seed), base, rank, targets or L.LCM_TARGETS)
    if decay and warmup >= steps:
        raise InputError(f'warmup = {warmup} of {steps} steps; with decay it must be less')
    rate = (
        optax.warmup_cosine_decay_schedule(0, lr, warmup, steps, lr / 100)
        if decay
        else optax.linear_schedule(0, lr, warmup)
        if warmup
        else lr
    )
    tx = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, weight_decay=weight_decay))
    loss = make_loss(
        pipe,
        scale=alpha / rank,
        target=target,
        solver_steps=solver_steps,
        w_range=(w_min, w_max),
        distance=distance,
        huber_c=huber_c,
    )
    indices = shuffled(len(cache.mean), batch, data_seed)
    print(
        f'training {count(lora):,} parameters in {len(lora)} modules (rank {rank}) over a frozen '
        f'base of {count(base):,}; {len(cache.mean)} samples, {steps} steps of {batch}'
    )

    def baked(state):
        return {
            path: {'down': ab['down'], 'up': ab['up'] * (alpha / rank)}
            for path, ab in pick(state).items()
        }

    def show(step, state, writer):
        pictures = pipe.with_lora({'unet': baked(state)})(
            list(PROMPTS), steps=4, sampler='lcm', guidance=1.0
        )
        writer.add_image(
            'four_steps',
            np.concatenate([np.asarray(p) for p in pictures], 1),
            step,
            dataformats='HWC',
        )

    state = loop.fit(
        loop.make_step(loss, tx, ema_decay),
        loop.init(lora, tx),
        (base, cache),
        indices,
        jax.random.key(seed),
        steps=steps,
        workdir=workdir,
        save_every=save_every,
        log_every=log_every,
        on_save=show,
        label='distil',
    )
    return baked(state)


def run(config, workdir):
    """A whole training run from a config -> path of the exported LoRA."""
    pipe = Pipeline.load(
        config.model,
        choose('dtype', config.dtype, {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}),
    )
    samples = emoji('train', config.data.styles)
    lora = distil(
        pipe,
        encode(pipe, samples),
        **config.lora,
        **config.distill,
        **config.train,
        data_seed=config.data.seed,
        weights=config.export.weights,
        workdir=workdir,
    )
    out = Path(workdir) / 'lcm_lora.safetensors'
    write_lora(
        out,
        {'unet': lora},
        pipe.params,
        alpha=config.lora.alpha,
        metadata=recipe(config.distill),
    )
    print(f'wrote {out}')
    return out


def recipe(distilled):
    """What a reader of the exported file should know -> safetensors metadata."""
    return {
        'lcm_jax.accelerates': 'true',
        'lcm_jax.w_min': str(distilled['w_min']),
        'lcm_jax.w_max': str(distilled['w_max']),
        'lcm_jax.solver_steps': str(distilled['solver_steps']),
    }


def parse(argv):
    """['--config=FILE', '--workdir=DIR', '--config.KEY=VALUE', ...] -> locked config, workdir.

    Raises InputError for a file that is not there, an unknown key and a value of another type.
    """
    config, _, _ = parse_flags([arg for arg in argv if not arg.startswith('--config.')])
    for arg in argv:
        if arg.startswith('--config.'):
            node = config
            for key in arg.removeprefix('--config.').split('=')[0].split('.'):
                node = choose('config key', key, node if isinstance(node, ConfigDict) else {})
    config, workdir, extra = parse_flags(argv)
    if extra or not workdir:
        raise InputError(
            f'arguments {" ".join(argv)}; give --config=FILE --workdir=DIR and, '
            'if you like, --config.KEY=VALUE'
        )
    return config, workdir


def parse_flags(argv):
    """Command line -> config, workdir, other arguments, as absl and ml_collections read it."""
    from absl import flags
    from ml_collections import config_flags

    argv = ['lcm_jax.train', *argv]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string('workdir', None, 'For the outputs.', flag_values=values)
    try:
        _, *extra = values(argv)
        if not (config.value and config.value.is_locked):  # an OSError, if the file cannot be read
            raise InputError('no --config=FILE given')
    except OSError as e:
        raise InputError(f'config file: {str(e).splitlines()[-1].strip()}') from e
    except (flags.Error, AttributeError, KeyError) as e:
        raise InputError(' '.join(str(e).split())) from e
    return config.value, workdir.value, extra


def main(argv=None):
    """Run the command line; bad input ends with one line on stderr and status 1."""
    argv = sys.argv[1:] if argv is None else argv
    if {'-h', '--help'} & {*argv}:
        return print(__doc__)
    try:
        run(*parse(argv))
    except InputError as e:
        sys.exit(f'error: {e}')


if __name__ == '__main__':
    main()
