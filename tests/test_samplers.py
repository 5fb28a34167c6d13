"""Every sampler against diffusers' scheduler, with a cheap analytic model on both sides."""

import functools
import itertools
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lcm_jax import samplers
from lcm_jax.diffusion import (
    CLEAN,
    KINDS,
    Pred,
    alpha_sigma,
    boundary,
    denoiser,
    guided,
    predict,
    schedule,
)
from lcm_jax.errors import InputError

torch.set_num_threads(1)

SHAPE = (2, 3, 3, 4)
TOLERANCE = 1e-4  # of the largest reference value
SD = {
    'num_train_timesteps': 1000,
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'beta_schedule': 'scaled_linear',
}
# Our sampler -> diffusers' scheduler as Stable Diffusion configures it.
SCHEDULERS = {
    'ddim': functools.partial(
        diffusers.DDIMScheduler, **SD, set_alpha_to_one=False, steps_offset=1, clip_sample=False
    ),
    'euler': functools.partial(
        diffusers.EulerDiscreteScheduler, **SD, steps_offset=1, timestep_spacing='leading'
    ),
    'dpm': functools.partial(
        diffusers.DPMSolverMultistepScheduler,
        **SD,
        steps_offset=1,
        algorithm_type='dpmsolver',
        final_sigmas_type='sigma_min',
    ),
    'dpm++': functools.partial(diffusers.DPMSolverMultistepScheduler, **SD, steps_offset=1),
    'lcm': functools.partial(diffusers.LCMScheduler, **SD),
}


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def net(xp, z, t):
    """A smooth model, the same in jax.numpy and torch; t is a scalar."""
    return 0.8 * xp.tanh(z) - 0.2 * xp.cos(3 * z + 0.002 * t)


ABAR = schedule()


def every_kind(z, t):
    """z [kind, *SHAPE] -> Pred of a model that answers in every kind of prediction at once."""
    alpha, sigma = alpha_sigma(ABAR, t)
    preds = [
        predict(kind, net(jnp, y, t.astype(jnp.float32)), y, alpha, sigma)
        for kind, y in zip(KINDS, z, strict=True)
    ]
    return jax.tree.map(lambda *y: jnp.stack(y), *preds)


def by_scan(sampler, times, z, noise):
    """`sample` itself: one program for each number of steps."""
    solver = samplers.SAMPLERS[sampler].solver(samplers.low_end(len(times) - 1, times))
    run = jax.jit(
        lambda z, times, noise: samplers.sample(
            every_kind, solver, z, times, ABAR, lambda i, shape: noise[i]
        )
    )
    return run(z, times, noise)


@functools.cache
def jitted_step(sampler, low_end):
    solver = samplers.SAMPLERS[sampler].solver(low_end)
    return solver.init, jax.jit(
        lambda state, z, t, s, noise: solver.step(
            state, z, every_kind(z, t), t, s, ABAR, lambda: noise
        )
    )


def by_loop(sampler, times, z, noise):
    """The same steps from Python: nothing to compile for another number of them."""
    init, step = jitted_step(sampler, samplers.low_end(len(times) - 1, times))
    state = init(z)
    for t, s, e in zip(times[:-1], times[1:], noise, strict=True):
        z, state = step(state, z, t, s, e)
    return z


def theirs(scheduler, z, noise, monkeypatch):
    """The same by diffusers, for the scheduler's own prediction type."""
    draws = iter(noise)
    monkeypatch.setattr(
        'diffusers.schedulers.scheduling_lcm.randn_tensor',
        lambda *args, **kwargs: torch.tensor(next(draws)),
    )
    z = torch.tensor(z) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = net(torch, scheduler.scale_model_input(z, t), float(t))
        z = scheduler.step(out, t, z).prev_sample
    return z.numpy()


def compare(run, sampler, n, monkeypatch, spacing=None):
    """Largest difference to diffusers over all prediction types, relative to its largest value."""
    z, noise = random(0, *SHAPE), random(1, n, *SHAPE)
    spaced = {'timestep_spacing': spacing} if spacing else {}
    times = samplers.times(sampler, n, spacing=spacing)
    got, worst = run(sampler, times, np.stack([z] * len(KINDS)), noise), 0
    for kind, mine in zip(KINDS, got, strict=True):
        scheduler = SCHEDULERS[sampler](prediction_type=kind, **spaced)
        scheduler.set_timesteps(n)
        assert times[:-1].tolist() == scheduler.timesteps.tolist()
        want = theirs(scheduler, z, noise, monkeypatch)
        worst = max(worst, np.abs(mine - want).max() / np.abs(want).max())
    return worst


@pytest.mark.parametrize('sampler', SCHEDULERS)
def test_every_step_count_and_prediction_type(sampler, monkeypatch):
    errors = {n: compare(by_loop, sampler, n, monkeypatch) for n in range(1, 51)}
    worst = max(errors, key=errors.get)
    print(f'{sampler}: largest relative difference {errors[worst]:.1e}, at {worst} steps')
    assert errors[worst] < TOLERANCE


@pytest.mark.parametrize('n', [1, 2, 4, 14, 15, 50])
@pytest.mark.parametrize('sampler', SCHEDULERS)
def test_one_program_of_all_steps(sampler, n, monkeypatch):
    assert compare(by_scan, sampler, n, monkeypatch) < TOLERANCE


@pytest.mark.parametrize(
    ('sampler', 'spacing', 'counts'),
    [
        # diffusers' DDIM steps from t to t - 1000 // n: the next listed time where n divides 1000
        ('ddim', 'trailing', (1, 2, 4, 5, 8, 10, 20, 25, 40, 50)),
        ('dpm', 'trailing', range(1, 51)),
        ('dpm', 'leading', range(1, 51)),
        ('dpm++', 'trailing', range(1, 51)),
        ('dpm++', 'leading', range(1, 51)),  # Stable Diffusion XL's own
    ],
)
def test_other_spacings(sampler, spacing, counts, monkeypatch):
    assert max(compare(by_loop, sampler, n, monkeypatch, spacing) for n in counts) < TOLERANCE


@pytest.mark.parametrize('n', [2, 4, 8, 14, 15, 20])
def test_dpm_solver_pp_that_ends_at_the_smallest_noise(n, monkeypatch):
    """With fewer than 15 steps the last is of first order, as in diffusers."""
    z, noise = random(0, *SHAPE), random(1, n, *SHAPE)
    times = samplers.times('dpm++', n, end=0)
    mine = by_loop('dpm++', times, np.stack([z] * len(KINDS)), noise)
    for kind, got in zip(KINDS, mine, strict=True):
        scheduler = SCHEDULERS['dpm++'](prediction_type=kind, final_sigmas_type='sigma_min')
        scheduler.set_timesteps(n)
        want = theirs(scheduler, z, noise, monkeypatch)
        assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize(
    ('sampler', 'final'),
    [('euler', CLEAN), ('dpm', 0), ('dpm++', CLEAN), ('dpm++', 0), ('lcm', CLEAN)],
)
@pytest.mark.parametrize('last', [0, 7])
def test_custom_timesteps_of_every_length(sampler, final, last, monkeypatch):
    """Each with random times before the last; diffusers' DDIM takes none."""
    ending = {'final_sigmas_type': 'sigma_min'} if final == 0 else {}
    kind, errors = 'epsilon', {}
    for n in range(2, 21):
        rng = np.random.default_rng(n)
        steps = [*np.sort(rng.choice(np.arange(8, 1000), n - 1, replace=False))[::-1], last]
        z, noise = random(n, *SHAPE), random(n + 99, n, *SHAPE)
        times = samplers.custom_times(sampler, steps, end=final)
        got = by_loop(sampler, times, np.stack([z] * len(KINDS)), noise)[[*KINDS].index(kind)]
        scheduler = SCHEDULERS[sampler](prediction_type=kind, **ending)
        scheduler.set_timesteps(timesteps=steps)
        want = theirs(scheduler, z, noise, monkeypatch)
        errors[n] = np.abs(got - want).max() / np.abs(want).max()
    worst = max(errors, key=errors.get)
    print(f'{sampler} to {final}, ..., {last}: {errors[worst]:.1e}, at {worst} steps')
    assert errors[worst] < TOLERANCE


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_ddim_times_are_diffusers_at_every_spacing(spacing):
    scheduler = SCHEDULERS['ddim'](timestep_spacing=spacing)
    for n in range(1, 1000):
        scheduler.set_timesteps(n)
        # [:n]: for some n, 61 the first, rounding makes diffusers' trailing list one more, at -1
        assert (
            samplers.times('ddim', n, spacing=spacing)[:-1].tolist()
            == scheduler.timesteps.tolist()[:n]
        )


def test_first_and_last_times():
    assert samplers.times('ddim', 4).tolist() == [751, 501, 251, 1, 0]
    assert samplers.times('dpm', 4).tolist() == [999, 749, 500, 250, 0]
    assert samplers.times('dpm++', 4).tolist() == [999, 749, 500, 250, CLEAN]
    assert samplers.times('lcm', 4).tolist() == [999, 759, 499, 259, CLEAN]


def test_lcm_times_of_the_reference():
    assert samplers.lcm_spacing(1).tolist() == [999]
    assert samplers.lcm_spacing(2).tolist() == [999, 499]
    assert samplers.lcm_spacing(8).tolist() == [999, 879, 759, 639, 499, 379, 259, 139]
    assert samplers.lcm_spacing(4, strength=0.5).tolist() == [499, 379, 259, 139]
    scheduler = SCHEDULERS['lcm']()
    for strength in (0.3, 0.6, 0.9):
        for n in range(1, int(50 * strength) + 1):
            scheduler.set_timesteps(n, strength=strength)
            assert (
                samplers.lcm_spacing(n, strength=strength).tolist() == scheduler.timesteps.tolist()
            )


@pytest.mark.parametrize('n', [1, 10])
def test_lcm_scheduler_fixture(n):
    fixture = np.load(Path(__file__).parent / 'data' / 'lcm_scheduler_fixture.npz')
    z, noise, abar = fixture['sample'], jnp.asarray(fixture['noise']), schedule()
    times = samplers.times('lcm', n)
    if n == 10:
        assert times[:-1].tolist() == fixture['timesteps10'].tolist()
    model = denoiser(lambda z, t: z * (t / (t + 1))[:, None, None, None], 'epsilon', abar)
    solver, state, sums = samplers.lcm(), (), []
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        # there is no tenth noise: the step to CLEAN multiplies it by 0
        z, state = solver.step(state, z, model(z, t), t, s, abar, lambda i=i: noise[min(i, 8)])
        sums.append(float(jnp.abs(z).sum()))
    np.testing.assert_allclose(z, fixture[f'final{n}'], atol=1e-5)
    assert sums[-1] == pytest.approx({1: 18.7097, 10: 197.7616}[n], abs=1e-3)
    assert float(jnp.abs(z).mean()) == pytest.approx({1: 0.0244, 10: 0.2575}[n], abs=1e-3)
    if n == 10:
        np.testing.assert_allclose(sums, fixture['trace10'], rtol=1e-5)


@pytest.mark.parametrize('solver', [samplers.dpm_solver(), samplers.dpm_solver_pp()])
def test_the_first_step_of_every_deterministic_solver_is_ddim(solver):
    """With times of each sample's own, as distillation takes it."""
    z, x = random(0, 3, 2, 2, 4), random(1, 3, 2, 2, 4)
    t, s, abar = jnp.array([19, 499, 999]), jnp.array([0, 479, 979]), schedule()
    pred = predict('sample', x, z, *alpha_sigma(abar, t, 4))
    (want, _), (got, _) = (
        k.step(k.init(z), z, pred, t, s, abar, None) for k in (samplers.ddim(), solver)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_only_shapes_and_step_counts_compile_anew():
    abar, traces = schedule(), []

    @jax.jit
    def run(z, times, keys, guidance, shift):
        traces.append(len(times) - 1)
        model = guided(denoiser(lambda z, t: jnp.tanh(z + shift), 'epsilon', abar), guidance)
        return samplers.sample(model, samplers.lcm(), z, times, abar, samplers.fresh(keys))

    def pictures(n=4, seed=0, guidance=2.0, shift=0.0, timesteps=None):
        times = samplers.custom_times('lcm', timesteps) if timesteps else samplers.times('lcm', n)
        keys = jax.random.split(jax.random.key(seed), 2)
        shift = np.full((4, 1, 1, 1), shift, np.float32)
        shift[1::2] = 0  # the null conditions
        return run(random(0, *SHAPE), times, keys, guidance, shift)

    changed = [
        pictures(),
        pictures(seed=1),
        pictures(shift=1),
        pictures(shift=1, guidance=3.0),
        pictures(timesteps=[999, 600, 300, 7]),
    ]
    assert traces == [4]
    for i, a in enumerate(changed):
        assert np.isfinite(a).all()
        assert all(np.abs(a - b).max() > 1e-3 for b in changed[:i])
    pictures(n=3)
    assert traces == [4, 3]


def test_a_picture_does_not_depend_on_the_batch_around_it():
    abar, keys = schedule(), jax.random.split(jax.random.key(0), 5)
    start = samplers.fresh(keys)(1000, (5, 3, 3, 4))

    @jax.jit
    def draw(z, keys):
        model = denoiser(lambda z, t: jnp.tanh(z), 'epsilon', abar)
        return samplers.sample(
            model, samplers.lcm(), z, samplers.times('lcm', 3), abar, samplers.fresh(keys)
        )

    def run(rows):
        return draw(start[rows], keys[rows])

    whole = run(jnp.arange(5))
    np.testing.assert_array_equal(run(jnp.array([3])), whole[3:4])
    np.testing.assert_array_equal(run(jnp.array([4, 0])), whole[jnp.array([4, 0])])
    noise = samplers.fresh(keys)
    assert np.abs(noise(0, SHAPE) - noise(1, SHAPE)).max() > 0.1


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (
            ('dmp++', 4),
            r"unknown sampler 'dmp\+\+' \(did you mean 'dpm\+\+'\?\); one of: ddim, dpm,",
        ),
        (('ddim', 0), 'steps = 0; ddim takes a whole number from 1 to 999'),
        (('dpm', 1000), 'steps = 1000; dpm takes a whole number from 1 to 999'),
        (('lcm', 51), 'steps = 51; lcm takes a whole number from 1 to 50'),
        (('lcm', 1.5), r'steps = 1\.5; lcm takes a whole number from 1 to 50'),
        (('lcm', '4'), "steps = '4'; lcm takes a whole number from 1 to 50"),
        (('ddim', 4, 1000, 'linspce'), r"unknown spacing 'linspce' \(did you mean 'linspace'\?\)"),
    ],
)
def test_bad_steps(args, message):
    with pytest.raises(InputError, match=message):
        samplers.times(*args)


def test_bad_strength():
    with pytest.raises(
        InputError, match=r'26 LCM steps; .* at strength 0\.5 .*; strength 0\.53 has'
    ):
        samplers.lcm_spacing(26, strength=0.5)


@pytest.mark.parametrize(
    'timesteps',
    [[], [499, 999], [999, 999], [1000, 5], [5, -1], [5.5, 1], ['5'], [[3, 1]], [[3], 1], 7],
)
def test_bad_timesteps(timesteps):
    with pytest.raises(InputError, match=r'timesteps .*: give falling whole numbers from 999 to 0'):
        samplers.custom_times('ddim', timesteps)


def test_custom_timesteps():
    assert samplers.custom_times('ddim', [999, 20]).tolist() == [999, 20, 0]
    assert samplers.custom_times('lcm', (999, 20), n=2).tolist() == [999, 20, CLEAN]
    with pytest.raises(InputError, match='steps = 3 but 2 timesteps are given'):
        samplers.custom_times('lcm', [999, 20], n=3)


def test_lcm_step_is_the_boundary_mix_renoised():
    abar, z, x, e = schedule(), *(random(i, *SHAPE) for i in range(3))
    got, _ = samplers.lcm().step((), z, Pred(x, None), 99, 49, abar, lambda: e)
    skip, out = boundary(jnp.float32(99))
    alpha, sigma = alpha_sigma(abar, 49)
    np.testing.assert_allclose(got, alpha * (skip * z + out * x) + sigma * e, rtol=1e-6)
