"""Solvers of the reverse process: pairs of pure functions, like optax's. One loop runs them all.

The model is a function (z, t) -> Pred; guidance is a combinator on it. Times fall from T-1 to 0;
the last target time is CLEAN (noise-free) or 0, as each method's reference (diffusers) has it.

Every solver here steps from one listed time to the next. diffusers' `DDIMScheduler` steps from t to
t - T // n whatever its list says; the two agree for `leading`, and for `trailing` if n divides T.
"""

import itertools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.diffusion import CLEAN, alpha_sigma, boundary, expand, predict
from lcm_jax.errors import InputError, choose


class Solver(NamedTuple):
    """init(z) -> state; step(state, z, pred, t, s, abar, noise) -> (z_s, state), for t -> s < t.

    t and s are scalars, or [B] in a single step from a fresh state.
    noise() draws Gaussian noise shaped like z; deterministic solvers do not call it.
    """

    init: Callable
    step: Callable


def ddim():
    """DDIM with eta 0 (arXiv 2010.02502, eq. 12)."""

    def step(state, z, pred, t, s, abar, noise):
        alpha, sigma = alpha_sigma(abar, s, z.ndim)
        return alpha * pred.x + sigma * pred.eps, state

    return Solver(lambda z: (), step)


def lcm(scaling=10.0):
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3; diffusers `LCMScheduler`)."""

    def step(state, z, pred, t, s, abar, noise):
        skip, out = (expand(c, z.ndim) for c in boundary(t, scaling))
        alpha, sigma = alpha_sigma(abar, s, z.ndim)
        return alpha * (skip * z + out * pred.x) + sigma * noise(), state

    return Solver(lambda z: (), step)


def _second_order(kind, first_order_end):
    """Multistep second-order solver: DDIM's step on an extrapolated prediction.

    kind names what the method integrates, 'epsilon' or 'sample'. The state is the previous
    prediction and its half log-SNR (inf: none yet, which makes the correction 0). A step to CLEAN
    is first-order, and one to time 0 if `first_order_end`.
    """

    def step(state, z, pred, t, s, abar, noise):
        (alpha, sigma), (alpha_s, sigma_s) = (alpha_sigma(abar, u, z.ndim) for u in (t, s))
        lam, lam_s = jnp.log(alpha / sigma), jnp.log(alpha_s / sigma_s)
        now, (before, lam_before) = pred.eps if kind == 'epsilon' else pred.x, state
        h = jnp.where(expand(s > 0 if first_order_end else s >= 0, z.ndim), lam_s - lam, 0.0)
        x, eps = predict(kind, now + h / (2 * (lam - lam_before)) * (now - before), z, alpha, sigma)
        return alpha_s * x + sigma_s * eps, (now, lam)

    return Solver(lambda z: (jnp.zeros_like(z), jnp.full((1,) * z.ndim, jnp.inf)), step)


def dpm_solver(first_order_end=False):
    """DPM-Solver-2M on the noise (arXiv 2206.00927; diffusers `algorithm_type='dpmsolver'`)."""
    return _second_order('epsilon', first_order_end)


def dpm_solver_pp(first_order_end=False):
    """DPM-Solver++(2M) on the data (arXiv 2211.01095; diffusers `algorithm_type='dpmsolver++'`)."""
    return _second_order('sample', first_order_end)


# One step of the teacher's ODE in distillation: (model, z, t [B], s [B], abar) -> z_s.


def ddim_step(model, z, t, s, abar):
    """DDIM: one evaluation of the model."""
    return ddim().step((), z, model(z, t), t, s, abar, None)[0]


def midpoint_step(kind):
    """DPM-Solver-2 (kind 'epsilon') and DPM-Solver++(2S) (kind 'sample'): two evaluations.

    arXiv 2206.00927 and 2211.01095, algorithm 1 each, with the second evaluation at the whole time u
    below t whose log-SNR is nearest to the middle of the step; at s where no time is between.
    """

    def step(model, z, t, s, abar):
        lam = 0.5 * jnp.log(abar / (1 - abar))
        middle = (lam[t] + lam[s]) / 2
        u = jnp.argmin(jnp.abs(lam - middle[:, None]), -1)
        u = jnp.maximum(jnp.minimum(u, t - 1), s)
        now = model(z, t)
        z_u = ddim().step((), z, now, t, u, abar, None)[0]
        later, h = model(z_u, u), lam[s] - lam[t]
        r = jnp.where(h > 0, (lam[u] - lam[t]) / jnp.where(h > 0, h, 1.0), 1.0)
        a, b = (p.eps if kind == 'epsilon' else p.x for p in (now, later))
        alpha, sigma = alpha_sigma(abar, t, z.ndim)
        pred = predict(kind, a + (b - a) / (2 * expand(r, z.ndim)), z, alpha, sigma)
        return ddim().step((), z, pred, t, s, abar, None)[0]

    return step


ODE_STEPS = {
    'ddim': ddim_step,
    'dpm': midpoint_step('epsilon'),
    'dpm++': midpoint_step('sample'),
}


# n points of T, falling.

DISTILLED_STEPS = 50  # solver steps of the published LCMs (diffusers `original_inference_steps`)


def leading(n, total=1000, offset=1):
    """Multiples of T // n, plus `offset` (diffusers `steps_offset`; 1 for Stable Diffusion)."""
    return np.arange(n)[::-1] * (total // n) + offset


def trailing(n, total=1000):
    """Every T / n down from T - 1."""
    return np.round(np.arange(total, 0, -total / n)).astype(int)[:n] - 1


def linspace(n, total=1000):
    """T - 1 to 0, both included."""
    return np.round(np.linspace(0, total - 1, n)).astype(int)[::-1]


def lcm_spacing(n, total=1000, original=DISTILLED_STEPS, strength=1.0):
    """n of the `original` times at which the LCM was distilled (diffusers `LCMScheduler`).

    strength < 1 leaves out the noisiest, for image-to-image. InputError for n above what is left.
    """
    times = np.arange(1, int(original * strength) + 1) * (total // original) - 1
    if n > len(times):
        least = min(1, (n + 0.5) / original)
        enough = f'; strength {least:g} has room for {n}' if n <= original else ''
        raise InputError(
            f'{n} LCM steps; at most {len(times)} at strength {strength} '
            f'(distilled on {original} times){enough}'
        )
    return times[::-1][np.floor(np.linspace(0, len(times), n, endpoint=False)).astype(int)]


SPACINGS = {'leading': leading, 'trailing': trailing, 'linspace': linspace, 'lcm': lcm_spacing}


class Sampler(NamedTuple):
    """A solver with the times that its reference implementation gives it."""

    solver: Callable  # whether `low_end` -> Solver
    spacing: str
    end: int  # the last target time: CLEAN or 0
    drop: int = 0  # points left out at the clean end: DPM-Solver spaces n + 1 of them and drops one
    steps: int = 50  # unless one says otherwise
    distilled: bool = False  # of LCMs: these know their times, and have guidance in their weights


# SD's configuration of diffusers' schedulers: set_alpha_to_one=False, steps_offset=1; SDXL's is
# 'euler'. Its noise of variance 1 is diffusers' for `leading` (other spacings: sigma_max there).
SAMPLERS = {
    'ddim': Sampler(lambda low: ddim(), 'leading', 0),
    'dpm': Sampler(lambda low: dpm_solver(first_order_end=low), 'linspace', 0, 1),
    'dpm++': Sampler(lambda low: dpm_solver_pp(first_order_end=low), 'linspace', CLEAN, 1),
    'euler': Sampler(lambda low: ddim(), 'leading', CLEAN),  # in sigma, Euler's step is DDIM's
    'lcm': Sampler(lambda low: lcm(), 'lcm', CLEAN, steps=4, distilled=True),
}


def times(sampler, n, total=1000, spacing=None, *, offset=1, end=None, strength=1.0):
    """Sampler name and number of steps -> [m+1] int32 times, falling, ending at the sampler's end.

    spacing: a key of SPACINGS, end: CLEAN or 0, in place of the sampler's own; offset is that of
    `leading`. strength < 1 starts from a noised picture: the steps that `latest` leaves, or all n
    at the LCM's times below it (see `lcm_spacing`).
    Raises InputError for an unknown name and for a number of steps outside the range.
    """
    row = choose('sampler', sampler, SAMPLERS)
    spacing = spacing or row.spacing
    points = choose('spacing', spacing, SPACINGS)
    # `trailing` and `lcm` have no point at the clean end that could be dropped.
    drop = row.drop if spacing in ('leading', 'linspace') else 0
    most = DISTILLED_STEPS if spacing == 'lcm' else total - 1 - drop * (spacing == 'leading')
    if not (isinstance(n, (int, np.integer)) and 1 <= n <= most):
        raise InputError(f'steps = {n!r}; {sampler} takes a whole number from 1 to {most}')
    extra = {'leading': {'offset': offset}, 'lcm': {'strength': strength}}.get(spacing, {})
    chosen = points(n + drop, total, **extra)[:n]
    if spacing != 'lcm':
        chosen = latest(chosen, strength)
    return np.append(chosen, row.end if end is None else end).astype(np.int32)


def latest(points, strength):
    """n falling times -> the last int(n strength) of them (diffusers `get_timesteps`); InputError if none."""
    n = len(points)
    left = int(n * strength)
    if not left:
        raise InputError(
            f'strength {strength} of {n} steps leaves none; give a strength of at least '
            f'{np.ceil(1e4 / n) / 1e4:g}, or at least {int(np.ceil(1 / strength))} steps'
        )
    return points[n - left :]


def custom_times(sampler, timesteps, total=1000, n=None, *, end=None, strength=1.0):
    """The user's own falling timesteps -> [m+1] int32 times with the sampler's end, or `end`.

    strength < 1 starts from a noised picture, at those that `latest` leaves.
    Raises InputError unless they fall strictly within 0..total-1 and number `n`, if that is given.
    """
    row = choose('sampler', sampler, SAMPLERS)
    try:
        points = [operator.index(t) for t in timesteps]
    except TypeError:
        points = []
    if not points or any(t <= s for t, s in itertools.pairwise([total, *points, -1])):
        raise InputError(
            f'timesteps {timesteps!r}: give falling whole numbers from {total - 1} to 0'
        )
    if n is not None and n != len(points):
        raise InputError(
            f'steps = {n} but {len(points)} timesteps are given; leave one of them out'
        )
    return np.append(latest(points, strength), row.end if end is None else end).astype(np.int32)


def low_end(n, times):
    """Whether DPM-Solver's step to time 0 is of first order, as in diffusers: the last of fewer than 15.

    n: the number of steps without regard to strength. A step to 0 that another follows is not the last.
    """
    return bool(n < 15 and times[-2] > times[-1] == 0)


def fresh(keys):
    """keys [B] -> noise(i, shape): Gaussian noise [B,...] of step i, each picture from its own key.

    A picture's noise does not depend on what else is in the batch.
    """

    def noise(i, shape):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape[1:]))(keys)

    return noise


def sample(model, solver, z, times, abar, noise, keep=lambda z, s: z):
    """Start noise z [B,h,w,C] -> sample [B,h,w,C]: one lax.scan over the steps; jit the caller.

    model: (z, t) -> Pred.  times [N+1] int, falling, as the function `times` gives them; they and
    abar [T] may be traced. noise(i, shape): Gaussian noise of step i (see `fresh`); only stochastic
    solvers draw it. keep(z, s) -> z changes what each step to time s gives; the last s is CLEAN.
    """

    def body(carry, xs):
        z, state = carry
        i, t, s, kept = xs
        z, state = solver.step(state, z, model(z, t), t, s, abar, lambda: noise(i, z.shape))
        return (keep(z, kept), state), None

    times = jnp.asarray(times)
    xs = jnp.arange(len(times) - 1), times[:-1], times[1:], jnp.append(times[1:-1], CLEAN)
    (z, _), _ = jax.lax.scan(body, (z, solver.init(z)), xs)
    return z
