"""What is learnt: consistency distillation and fine-tuning (arXiv 2310.04378), and plain denoising.

An objective is a function (nets, batch, draws, noise, **settings) -> the loss of each sample [B].
Networks are functions net(z, t, **cond) -> output; objectives know no modules. batch holds clean
latents 'z' [B,h,w,C] and the condition 'cond', and where a teacher is asked the null condition
'null', [B, ...] each. Gradients reach the student only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.diffusion import (
    alpha_sigma,
    boundary,
    denoiser,
    expand,
    guided,
    output_of,
    side_by_side,
)
from lcm_jax.errors import InputError, choose
from lcm_jax.samplers import ODE_STEPS

DISTANCES = {
    'l2': lambda a, b, c: (a - b) ** 2,
    'huber': lambda a, b, c: jnp.sqrt((a - b) ** 2 + c**2) - c,  # pseudo-Huber
}

# Guidance of the teacher, in the papers' convention: the usual scale is 1 + w.
W_RANGES = {
    'paper': (2.0, 14.0),  # LCM, arXiv 2310.04378, section 5
    'report': (7.5, 7.5),  # the published LCM-LoRAs, arXiv 2311.05556
    'script': (5.0, 15.0),  # diffusers train_lcm_distill_lora_sd_wds.py
    'script_sdxl': (3.0, 15.0),  # diffusers train_lcm_distill_lora_sdxl_wds.py
}


class Nets(NamedTuple):
    """Networks of one step, net(z, t, **cond) -> output; None for what an objective does not ask."""

    student: Callable
    target: Callable | None
    teacher: Callable | None


class Noise(NamedTuple):
    """The model's noise schedule, and what its network predicts."""

    abar: jax.Array  # [T] cumulative alphas
    kind: str  # prediction type


class Draws(NamedTuple):
    """What is random in one step."""

    noise: jax.Array  # [B,h,w,C]
    t: jax.Array  # [B] int: a solver time
    s: jax.Array  # [B] int: the solver time before it, 0 at the end
    w: jax.Array  # [B] guidance in the papers' convention: the usual scale is 1 + w


def w_range(text):
    """A key of W_RANGES, 'W' or 'LOW:HIGH' -> (low, high). Raises InputError for anything else."""
    if text in W_RANGES:
        return W_RANGES[text]
    low, _, high = text.partition(':')
    try:
        low, high = float(low), float(high or low)
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high < float('inf'):
        raise InputError(
            f'guidance range w = {text!r}; give W, LOW:HIGH or one of {", ".join(W_RANGES)}'
        )
    return low, high


def each(key, rows):
    """A key of its own for each row [B] of the global batch, whatever the devices."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def draw(key, rows, shape, *, steps, total, w_range, skip=0):
    """Draws for the rows [B] of the global batch: each one's own, whatever the batch around it.

    t is one of `steps` solver times d i - 1, i = 1..steps, d = total // steps; s = t - skip, or 0
    before the first; a skip of 0 is d. w is uniform in w_range; shape is that of one z. Raises
    InputError unless 1 <= steps <= total and skip is a multiple of d, so that s is a solver time too.
    """
    if not 1 <= steps <= total:
        raise InputError(f'{steps} solver steps; a schedule of {total} times takes 1 to {total}')
    apart = total // steps
    if not 0 <= skip <= total or skip % apart:
        raise InputError(
            f'skip = {skip}; give a multiple of {apart}, how far {steps} solver steps are apart'
        )
    skip = skip or apart

    def one(key):
        noise, time, guide = jax.random.split(key, 3)
        t = apart * jax.random.randint(time, (), 1, steps + 1) - 1
        w = jax.random.uniform(guide, (), minval=w_range[0], maxval=w_range[1])
        return Draws(jax.random.normal(noise, shape), t, jnp.maximum(t - skip, 0), w)

    return jax.vmap(one)(each(key, rows))


def consistency(net, kind, abar):
    """net(z, t) -> output  =>  the consistency function f(z, t) = c_skip z + c_out x(z, t) (eq. 9).

    z [B,h,w,C], t [B] int -> [B,h,w,C] float32.
    """
    model = denoiser(net, kind, abar)

    def f(z, t):
        skip, out = (expand(c, z.ndim) for c in boundary(t.astype(jnp.float32)))
        return skip * z + out * model(z, t).x

    return f


def lcm(nets, batch, draws, noise, *, solver, distance, huber_c):
    """Latent consistency distillation (algorithm 1; LCM-LoRA: arXiv 2311.05556).

    Distance of the student's f(z_t, t) to the target's f(z_s, s), z_s one guided step of the
    teacher's ODE on. The teacher runs on condition and null in one call. solver: a key of
    samplers.ODE_STEPS; distance: a key of DISTANCES, huber_c its constant in units of z.
    Raises InputError for an unknown solver, distance or prediction type.
    """
    measure, step = choose('distance', distance, DISTANCES), choose('solver', solver, ODE_STEPS)
    both = jax.tree.map(side_by_side, batch['cond'], batch['null'])
    model = denoiser(lambda z, t: nets.teacher(z, t, **both), noise.kind, noise.abar)
    model = guided(model, expand(1 + draws.w, batch['z'].ndim))
    z_t = _noised(batch['z'], draws.noise, draws.t, noise.abar)
    z_s = jax.lax.stop_gradient(step(model, z_t, draws.t, draws.s, noise.abar))
    return _consistent(nets, batch['cond'], z_t, z_s, draws, noise, measure, huber_c)


def lcf(nets, batch, draws, noise, *, distance, huber_c):
    """Latent consistency fine-tuning (section 4.4): as `lcm`, without a teacher.

    z_t and z_s are made from the same latents and the same noise.
    """
    measure = choose('distance', distance, DISTANCES)
    z_t, z_s = (_noised(batch['z'], draws.noise, u, noise.abar) for u in (draws.t, draws.s))
    return _consistent(nets, batch['cond'], z_t, z_s, draws, noise, measure, huber_c)


def denoise(nets, batch, draws, noise, *, min_snr):
    """Mean squared error of the prediction, as diffusion models are trained.

    min_snr: gamma of min-SNR weighting (arXiv 2303.09556, as diffusers' `snr_gamma`); 0: none.
    """
    z0, eps, t = batch['z'], draws.noise, draws.t
    alpha, sigma = alpha_sigma(noise.abar, t, z0.ndim)
    out = nets.student(alpha * z0 + sigma * eps, t, **batch['cond']).astype(jnp.float32)
    loss = _per_sample((out - output_of(noise.kind, z0, eps, alpha, sigma)) ** 2)
    if not min_snr:
        return loss
    snr = (alpha / sigma).reshape(-1) ** 2
    of_x = {'sample': 1.0, 'epsilon': snr, 'v_prediction': snr + 1}[noise.kind]
    return loss * jnp.minimum(snr, min_snr) / of_x  # the error of x is the prediction's over of_x


def _consistent(nets, cond, z_t, z_s, draws, noise, measure, huber_c):
    def f(net):
        return consistency(lambda z, t: net(z, t, **cond), noise.kind, noise.abar)

    goal = jax.lax.stop_gradient(f(nets.target)(z_s, draws.s))
    return _per_sample(measure(f(nets.student)(z_t, draws.t), goal, huber_c))


def _noised(z0, eps, t, abar):
    alpha, sigma = alpha_sigma(abar, t, z0.ndim)
    return alpha * z0 + sigma * eps


def _per_sample(x):
    return x.reshape(len(x), -1).mean(1)


class Objective(NamedTuple):
    """A row of OBJECTIVES."""

    loss: Callable
    settings: tuple[str, ...]  # the keys of configs/default.py's `distill` that the loss takes
    teacher: bool  # asks the frozen base
    target: bool  # compares the student with a target network

    def bind(self, settings):
        """Values of `settings` -> loss(nets, batch, draws, noise) -> [B]."""
        own = {name: settings[name] for name in self.settings}
        return lambda *args: self.loss(*args, **own)


OBJECTIVES = {
    'lcm': Objective(lcm, ('solver', 'distance', 'huber_c'), True, True),
    'lcf': Objective(lcf, ('distance', 'huber_c'), False, True),
    'denoise': Objective(denoise, ('min_snr',), False, False),
}
