"""Noise schedule and what a network's output means: z_t = alpha_t x + sigma_t eps. Pure functions.

Times are integers 0..T-1 as in DDPM; CLEAN stands for noise-free data (alpha 1, sigma 0).
`abar` is the table of cumulative alphas [T], so alpha_t = sqrt(abar[t]).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.errors import choose

CLEAN = -1


def _cosine(lo, hi, n):
    """Improved DDPM (arXiv 2102.09672, eq. 17); it has no use for the end points."""
    alphas = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas[1:] / alphas[:-1], 0.999)


BETAS = {
    'scaled_linear': lambda lo, hi, n: np.linspace(lo**0.5, hi**0.5, n, dtype=np.float64) ** 2,
    'linear': lambda lo, hi, n: np.linspace(lo, hi, n, dtype=np.float64),
    'squaredcos_cap_v2': _cosine,
}
# The least abar: a last alpha of 0 has no log-SNR (diffusers' Euler and DPM-Solver alike).
LEAST = 2.0**-24


def schedule(
    kind='scaled_linear', start=0.00085, end=0.012, steps=1000, *, betas=None, zero_snr=False
):
    """-> abar [steps] float32: the cumulative alphas; the defaults are Stable Diffusion's.

    kind is diffusers' `beta_schedule`; InputError for one that BETAS lacks. betas [steps] replace
    it. zero_snr: shifted and scaled such that the last time is pure noise (arXiv 2305.08891,
    algorithm 1), but for LEAST.
    """
    if betas is None:
        betas = choose('beta_schedule', kind, BETAS)(start, end, steps)
    abar = np.cumprod(1 - np.asarray(betas, np.float64))
    if zero_snr:
        alpha = np.sqrt(abar)
        abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return jnp.asarray(np.maximum(abar, LEAST) if zero_snr else abar, jnp.float32)


def alpha_sigma(abar, t, ndim=0):
    """t [B] or scalar, int -> alpha, sigma [B, 1, ..., 1] of `ndim` axes; CLEAN -> 1, 0."""
    a = jnp.where(t < 0, 1.0, abar[jnp.maximum(t, 0)])
    a = expand(a, ndim)
    return jnp.sqrt(a), jnp.sqrt(1 - a)


def expand(x, ndim):
    """x [B] or scalar -> [B, 1, ..., 1] of `ndim` axes, to multiply an array of that rank."""
    return jnp.reshape(x, (*jnp.shape(x), *(1,) * max(0, ndim - jnp.ndim(x))))


class Pred(NamedTuple):
    """A network's answer in both forms; z = alpha x + sigma eps holds between them."""

    x: jax.Array  # the data
    eps: jax.Array  # the noise


KINDS = {
    'epsilon': lambda out, z, alpha, sigma: Pred((z - sigma * out) / alpha, out),
    'sample': lambda out, z, alpha, sigma: Pred(out, (z - alpha * out) / sigma),
    # v = alpha eps - sigma x (arXiv 2202.00512, appendix D)
    'v_prediction': lambda out, z, alpha, sigma: Pred(
        alpha * z - sigma * out, alpha * out + sigma * z
    ),
}


def predict(kind, out, z, alpha, sigma):
    """What the network said of z [B,h,w,C] -> Pred(x, eps). kind is diffusers' `prediction_type`.

    alpha, sigma broadcast against z. Raises InputError for an unknown kind.
    """
    return choose('prediction_type', kind, KINDS)(out, z, alpha, sigma)


OUTPUTS = {  # the inverse of KINDS
    'epsilon': lambda x, eps, alpha, sigma: eps,
    'sample': lambda x, eps, alpha, sigma: x,
    'v_prediction': lambda x, eps, alpha, sigma: alpha * eps - sigma * x,
}


def output_of(kind, x, eps, alpha, sigma):
    """What a network of that prediction type should have said of alpha x + sigma eps."""
    return choose('prediction_type', kind, OUTPUTS)(x, eps, alpha, sigma)


def boundary(t, scaling=10.0, sigma_data=0.5):
    """t [...] -> c_skip, c_out [...] of the consistency function; 1, 0 at t = 0: f(z, 0) = z.

    Latent consistency models (arXiv 2310.04378), time scaled as in diffusers' `LCMScheduler`.
    """
    t = scaling * t
    total = t**2 + sigma_data**2
    return sigma_data**2 / total, t / jnp.sqrt(total)


def denoiser(net, kind, abar):
    """net(z, t) -> output  =>  model(z, t) -> Pred in float32.

    The model takes t as a scalar or [B]; the net gets [B].
    """

    def model(z, t):
        t = jnp.broadcast_to(t, z.shape[:1])
        alpha, sigma = alpha_sigma(abar, t, z.ndim)
        return predict(kind, net(z, t).astype(jnp.float32), z, alpha, sigma)

    return model


def side_by_side(cond, null):
    """Two arrays [B,...] -> [2B,...]: of each sample its condition and its null condition, in turn.

    One after the other, not first all of one: so both are on the device that has the sample.
    """
    return jnp.stack([cond, null], 1).reshape(-1, *cond.shape[1:])


def guided(model, scale):
    """Classifier-free guidance (arXiv 2207.12598) as in diffusers: null + scale (cond - null).

    `model` runs on [2B], see `side_by_side`; the result is on [B]. scale is a scalar or broadcasts
    against [B,h,w,C]; 1 is the condition alone. In the LCM papers'
    convention, scale = 1 + w. Mixing x and eps alike keeps z = alpha x + sigma eps.
    """

    def wrapped(z, t):
        t = jnp.broadcast_to(t, z.shape[:1])
        both = model(side_by_side(z, z), side_by_side(t, t))

        def mix(y):
            cond, null = jnp.moveaxis(y.reshape(-1, 2, *y.shape[1:]), 1, 0)
            return null + scale * (cond - null)

        return jax.tree.map(mix, both)

    return wrapped
