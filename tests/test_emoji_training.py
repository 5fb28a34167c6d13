"""The steps of the scripts that made the emoji family, tools/emoji/train_*.py, still trace."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm_jax import loop
from lcm_jax.models.unet import UNet
from lcm_jax.models.vae import VAE

PICTURES = jnp.zeros((2, 64, 64, 3))


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'tools' / 'emoji')


def clip():
    import train_clip

    spec, batch = train_clip.text_spec(vocab=50), (PICTURES, jnp.zeros((2, 32), int))
    params = jax.eval_shape(partial(train_clip.init, spec), jax.random.key(0), *batch)
    return partial(train_clip.loss, spec=spec), params, None, batch


def vae():
    import train_vae

    params = jax.eval_shape(VAE(train_vae.SPEC).init, jax.random.key(0), PICTURES)['params']
    return train_vae.loss, params, {}, PICTURES


def teacher():
    import train_teacher

    spec, z = train_teacher.spec_for(8, 16), jnp.zeros((2, 8, 8, 16))
    texts, at = jnp.zeros((2, train_teacher.VARIANTS, 32, 8)), np.zeros(2, int)
    params = jax.eval_shape(UNet(spec).init, jax.random.key(0), z, at, texts[:, 0])['params']
    loss = partial(train_teacher.loss, spec=spec, scaling=1.0, min_snr=5.0)
    return loss, params, (z, z, texts, texts[0, 0]), (at, at)


@pytest.mark.parametrize('script', [clip, vae, teacher])
def test_a_step_traces(script):
    loss, params, frozen, batch = script()
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(partial(loop.init, tx=tx, ema_decay=0.9), params)
    step = loop.make_step(loss, tx, ema_decay=0.9)
    after, _ = jax.eval_shape(step, state, frozen, batch, jax.random.key(0))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_retrieval():
    import train_clip

    x = np.eye(120, dtype=np.float32)
    assert train_clip.retrieval(x, x) == 1
    assert train_clip.retrieval(x, np.roll(x, 1, 0)) == 0
