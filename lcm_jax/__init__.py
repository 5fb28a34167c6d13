"""Latent consistency models and LCM-LoRA for Stable Diffusion, in JAX."""

import os
from pathlib import Path

import jax

# Compiled programs are kept between runs; JAX_COMPILATION_CACHE_DIR names another place.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    _cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'lcm_jax'
    jax.config.update('jax_compilation_cache_dir', str(_cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def __getattr__(name):  # `from lcm_jax import Pipeline` without making every import pay for it
    if name == 'Pipeline':
        from lcm_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
