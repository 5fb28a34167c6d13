"""scheduler_config.json of diffusers -> what it says about the model: noise, prediction and times.

Which solver draws is the user's choice, so any scheduler class is read, and what only concerns its
own solver (`use_karras_sigmas`, `clip_sample`, `skip_prk_steps`, ...) is left aside.
"""

from typing import NamedTuple

import jax

from lcm_jax import samplers
from lcm_jax.diffusion import CLEAN, KINDS, schedule
from lcm_jax.errors import choose
from lcm_jax.models.configs import Config

# Keys that change the computation, with the only values that is computed here.
ONLY = {
    'original_inference_steps': (samplers.DISTILLED_STEPS,),
    'thresholding': (False,),
    'timestep_scaling': (10.0,),
}
# Sampler -> the key that says where its last step ends, and what its values mean.
ENDS = {
    'ddim': ('set_alpha_to_one', {True: CLEAN, False: 0}),
    'euler': ('final_sigmas_type', {'zero': CLEAN, 'sigma_min': 0}),
    'dpm++': ('final_sigmas_type', {'zero': CLEAN, 'sigma_min': 0}),
}


class Schedule(NamedTuple):
    """The noise that a model was trained with, and what its folder says of the times to draw at."""

    abar: jax.Array  # [T] float32
    prediction_type: str
    spacing: str | None  # of the steps; None: the sampler's own
    offset: int  # of `leading` times
    ends: dict[str, int]  # sampler -> its last target time, where it is not the sampler's own
    few_steps: bool = False  # a consistency model: drawn by 'lcm' unless one asks otherwise

    def times(self, sampler, steps, spacing=None, strength=1.0):
        """-> [m+1] int32 times, as `samplers.times` gives them for this model."""
        own = choose('sampler', sampler, samplers.SAMPLERS).distilled  # whatever the folder says
        return samplers.times(
            sampler,
            steps,
            len(self.abar),
            spacing or (None if own else self.spacing),
            offset=self.offset,
            end=self.ends.get(sampler),
            strength=strength,
        )

    def custom_times(self, sampler, timesteps, steps=None, strength=1.0):
        """-> [m+1] int32 times, as `samplers.custom_times` gives them for this model."""
        return samplers.custom_times(
            sampler,
            timesteps,
            len(self.abar),
            steps,
            end=self.ends.get(sampler),
            strength=strength,
        )


def read_schedule(config, source='scheduler/scheduler_config.json'):
    """scheduler_config.json as a dict -> Schedule.

    Its `timestep_spacing` counts if it is 'trailing': the others are defaults of diffusers' classes
    that every saved folder repeats, 'trailing' somebody chose for the model (zero terminal SNR,
    few-step distillation). Raises InputError for a value that is not supported.
    """
    config = Config(config, ONLY, source)
    kind = config.get('prediction_type', 'epsilon')
    choose('prediction_type', kind, KINDS)
    betas = config.get('trained_betas')
    shape = () if betas else (config['beta_schedule'], config['beta_start'], config['beta_end'])
    abar = schedule(
        *shape,
        **({} if betas else {'steps': config['num_train_timesteps']}),
        betas=betas,
        zero_snr=bool(config.get('rescale_betas_zero_snr')),
    )
    spacing = config.get('timestep_spacing')
    ends = {
        sampler: choose(key, config[key], values)
        for sampler, (key, values) in ENDS.items()
        if config.get(key) is not None
    }
    return Schedule(
        abar,
        kind,
        spacing if spacing == 'trailing' else None,
        config.get('steps_offset', 1),
        ends,
        few_steps(config),
    )


def few_steps(config):
    """scheduler_config.json as a dict -> whether it is a consistency model's."""
    return config.get('_class_name') == 'LCMScheduler'
