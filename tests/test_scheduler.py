"""scheduler_config.json: the noise and the times that diffusers reads from it."""

import diffusers
import numpy as np
import pytest

from lcm_jax.diffusion import CLEAN
from lcm_jax.errors import InputError
from lcm_jax.scheduler import read_schedule

SD = {
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'num_train_timesteps': 1000,
}


@pytest.mark.parametrize(
    'config',
    [
        SD,
        SD | {'beta_schedule': 'linear', 'num_train_timesteps': 500},
        SD | {'beta_schedule': 'squaredcos_cap_v2'},
        SD | {'rescale_betas_zero_snr': True},
        SD | {'trained_betas': np.linspace(1e-3, 2e-2, 1000).tolist()},
    ],
)
@pytest.mark.parametrize('scheduler', ['DDIMScheduler', 'EulerDiscreteScheduler', 'PNDMScheduler'])
def test_noise_is_diffusers(config, scheduler):
    if scheduler == 'PNDMScheduler' and 'rescale_betas_zero_snr' in config:
        pytest.skip('PNDM rescales nothing')
    theirs = getattr(diffusers, scheduler).from_config(config)
    ours = read_schedule(dict(theirs.config)).abar
    np.testing.assert_allclose(ours[:-1], theirs.alphas_cumprod[:-1], rtol=5e-5)
    np.testing.assert_allclose(ours[-1], theirs.alphas_cumprod[-1], rtol=5e-5, atol=1e-7)


def test_times_of_a_folder():
    schedule = read_schedule(SD | {'timestep_spacing': 'trailing', 'set_alpha_to_one': True})
    assert schedule.times('ddim', 4).tolist() == [999, 749, 499, 249, CLEAN]
    assert schedule.times('ddim', 4, 'leading').tolist() == [751, 501, 251, 1, CLEAN]
    assert schedule.times('lcm', 4).tolist() == [999, 759, 499, 259, CLEAN]
    assert schedule.custom_times('ddim', [9, 3]).tolist() == [9, 3, CLEAN]
    schedule = read_schedule(
        SD | {'timestep_spacing': 'linspace', 'steps_offset': 0, 'final_sigmas_type': 'sigma_min'}
    )
    assert schedule.times('ddim', 4).tolist() == [750, 500, 250, 0, 0]  # the sampler's own spacing
    assert schedule.times('dpm++', 4).tolist() == [999, 749, 500, 250, 0]
    assert schedule.times('euler', 2, strength=0.5).tolist() == [0, 0]


@pytest.mark.parametrize(
    ('config', 'said'),
    [
        ({k: v for k, v in SD.items() if k != 'beta_end'}, "the key 'beta_end' is missing"),
        (SD | {'beta_schedule': 'sigmoid'}, "unknown beta_schedule 'sigmoid'; one of: scaled"),
        (SD | {'prediction_type': 'flow'}, "unknown prediction_type 'flow'"),
        (SD | {'final_sigmas_type': 'one'}, "unknown final_sigmas_type 'one'; one of: zero"),
        (SD | {'timestep_scaling': 5.0}, 'timestep_scaling = 5.0 is not supported; accepted: 10.0'),
        (SD | {'thresholding': True}, 'thresholding = True is not supported'),
    ],
)
def test_what_is_not_supported_is_named(config, said):
    with pytest.raises(InputError, match=said):
        read_schedule(config)
