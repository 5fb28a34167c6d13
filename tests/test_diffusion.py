"""The noise schedule and what a network's output means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion import (
    CLEAN,
    KINDS,
    alpha_sigma,
    boundary,
    denoiser,
    guided,
    predict,
    schedule,
    side_by_side,
)
from lcm_jax.errors import InputError


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_schedule_values_of_stable_diffusion():
    want = {
        0: 0.99914998,
        19: 0.98224396,
        259: 0.65897524,
        499: 0.27766943,
        759: 0.05221289,
        999: 0.0046600951,
    }
    abar = schedule()
    assert abar.dtype == jnp.float32 and abar.shape == (1000,)
    np.testing.assert_allclose(abar[np.array([*want])], [*want.values()], rtol=2e-6)


@pytest.mark.parametrize('kind', ['linear', 'scaled_linear'])
def test_schedule_is_diffusers(kind):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        beta_schedule=kind, beta_start=1e-4, beta_end=0.02, num_train_timesteps=500
    )
    np.testing.assert_allclose(schedule(kind, 1e-4, 0.02, 500), theirs.alphas_cumprod, rtol=1e-5)


def test_alpha_sigma_shapes_and_clean_end():
    abar = schedule()
    alpha, sigma = alpha_sigma(abar, jnp.array([CLEAN, 0, 999]), 4)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha[0] == 1 and sigma[0] == 0
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    assert alpha_sigma(abar, 5, 4)[0].shape == (1, 1, 1, 1)
    assert alpha_sigma(abar, 5)[0].shape == ()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('t', [0, 19, 499, 999])
def test_predict_round_trip(kind, t):
    x, eps = random(0, 2, 3, 3, 4), random(1, 2, 3, 3, 4)
    alpha, sigma = alpha_sigma(schedule(), t, 4)
    z = alpha * x + sigma * eps
    said = {'epsilon': eps, 'sample': x, 'v_prediction': alpha * eps - sigma * x}[kind]
    pred = predict(kind, said, z, alpha, sigma)
    # Rounding of z is divided by alpha on the way to x, by sigma on the way to eps.
    np.testing.assert_allclose(pred.x, x, atol=1e-6 / float(alpha[0, 0, 0, 0]))
    np.testing.assert_allclose(pred.eps, eps, atol=1e-6 / float(sigma[0, 0, 0, 0]))


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(
        InputError, match=r"unknown prediction_type 'v-prediction'.*'v_prediction'.*epsilon"
    ):
        predict('v-prediction', 0, 0, 1, 0)
    with pytest.raises(InputError, match=r"unknown beta_schedule 'squared'.*scaled_linear"):
        schedule('squared')


def test_consistency_function_is_the_identity_at_time_zero():
    assert [float(c) for c in boundary(jnp.float32(0))] == [1, 0]
    skip, out = boundary(jnp.array([19.0, 999.0]))
    np.testing.assert_allclose(skip, [0.25 / (190**2 + 0.25), 0.25 / (9990**2 + 0.25)], rtol=1e-6)
    np.testing.assert_allclose(
        out, [190 / (190**2 + 0.25) ** 0.5, 9990 / (9990**2 + 0.25) ** 0.5], rtol=1e-6
    )


def test_denoiser_gives_the_net_a_batch_of_times_and_float32_back():
    def net(z, t):
        assert t.shape == (2,)
        return (z * t[:, None, None, None]).astype(jnp.bfloat16)

    z = random(0, 2, 3, 3, 4)
    one, many = (denoiser(net, 'epsilon', schedule())(z, t) for t in (499, jnp.array([499, 499])))
    assert one.x.dtype == one.eps.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize('kind', KINDS)
def test_guidance_mixes_the_pairs_and_keeps_the_identity(kind):
    abar, z, shift = schedule(), random(0, 2, 3, 3, 4), random(1, 4, 1, 1, 4)

    def net(z, t):  # the four conditions: of each sample its own, then its null one
        return jnp.tanh(z + shift)

    both = denoiser(net, kind, abar)(side_by_side(z, z), 259)
    cond, null = (
        jax.tree.map(lambda y, rows=rows: y[rows], both)
        for rows in (slice(0, 4, 2), slice(1, 4, 2))
    )
    scale = np.array([3.0, 7.5]).reshape(2, 1, 1, 1)  # one per sample
    pred = guided(denoiser(net, kind, abar), scale)(z, 259)
    np.testing.assert_allclose(pred.x, null.x + scale * (cond.x - null.x), atol=1e-5)
    np.testing.assert_allclose(pred.eps, null.eps + scale * (cond.eps - null.eps), atol=1e-5)
    alpha, sigma = alpha_sigma(abar, 259)
    np.testing.assert_allclose(alpha * pred.x + sigma * pred.eps, z, atol=2e-5)
    alone = guided(denoiser(net, kind, abar), 1.0)(z, 259)
    np.testing.assert_allclose(alone.x, cond.x, atol=1e-5)
