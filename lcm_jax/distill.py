"""Latent consistency distillation (arXiv 2310.04378, algorithm 1; LCM-LoRA: arXiv 2311.05556).

Student, target and teacher are functions net(z, t, **cond) -> output; the loss knows no modules.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm_jax.diffusion import alpha_sigma, boundary, denoiser, expand, guided
from lcm_jax.errors import InputError, choose

DISTANCES = {
    'l2': lambda a, b, c: (a - b) ** 2,
    'huber': lambda a, b, c: jnp.sqrt((a - b) ** 2 + c**2) - c,  # pseudo-Huber
}


class Draws(NamedTuple):
    """What is random in one distillation step."""

    noise: jax.Array  # [B,h,w,C]
    t: jax.Array  # [B] int: a solver time
    s: jax.Array  # [B] int: the solver time before it, 0 at the end
    w: jax.Array  # [B] guidance in the papers' convention: the usual scale is 1 + w


def draw(key, indices, shape, *, steps, total, w_range):
    """Draws for the samples numbered `indices` [B]: each one's own, whatever the batch around it.

    t is one of `steps` solver times k i - 1, i = 1..steps, k = total // steps; w is uniform in
    w_range; shape is that of one z. Raises InputError unless 1 <= steps <= total.
    """
    if not 1 <= steps <= total:
        raise InputError(f'{steps} solver steps; a schedule of {total} times takes 1 to {total}')
    k = total // steps

    def one(index):
        noise, time, guide = jax.random.split(jax.random.fold_in(key, index), 3)
        t = k * jax.random.randint(time, (), 1, steps + 1) - 1
        w = jax.random.uniform(guide, (), minval=w_range[0], maxval=w_range[1])
        return Draws(jax.random.normal(noise, shape), t, jnp.maximum(t - k, 0), w)

    return jax.vmap(one)(indices)


def consistency(net, kind, abar):
    """net(z, t) -> output  =>  the consistency function f(z, t) = c_skip z + c_out x(z, t) (eq. 9).

    z [B,h,w,C], t [B] int -> [B,h,w,C] float32.
    """
    model = denoiser(net, kind, abar)

    def f(z, t):
        skip, out = (expand(c, z.ndim) for c in boundary(t.astype(jnp.float32)))
        return skip * z + out * model(z, t).x

    return f


def lcm_loss(student, target, teacher, batch, draws, abar, *, solver, kind, distance, huber_c):
    """-> scalar: distance of f(z_t, t) to the target's f(z_s, s), z_s one guided solver step on.

    student, target, teacher: net(z, t, **cond) -> output; gradients reach the student only.
    batch: {'z': clean latents [B,h,w,C], 'cond': {...}, 'null': {...}} with the conditions of each
    sample and the null conditions, [B,...] each. The teacher runs once for both. `solver` is a
    deterministic Solver, `kind` the networks' prediction type, `distance` a key of DISTANCES and
    huber_c its constant in units of z. Raises InputError for an unknown kind or distance.
    """
    measure = choose('distance', distance, DISTANCES)
    z0, (noise, t, s, w) = batch['z'], draws
    alpha, sigma = alpha_sigma(abar, t, z0.ndim)
    z_t = alpha * z0 + sigma * noise

    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), batch['cond'], batch['null'])
    ode = guided(denoiser(lambda z, t: teacher(z, t, **both), kind, abar), expand(1 + w, z0.ndim))
    z_s, _ = solver.step(solver.init(z_t), z_t, ode(z_t, t), t, s, abar, None)

    def f(net):
        return consistency(lambda z, t: net(z, t, **batch['cond']), kind, abar)

    goal = jax.lax.stop_gradient(f(target)(z_s, s))
    return jnp.mean(measure(f(student)(z_t, t), goal, huber_c))
