"""Pictures and captions -> latents and conditions, as training takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lcm_jax.conditioning import encode_text
from lcm_jax.images import signed
from lcm_jax.models.layers import for_strips, in_strips
from lcm_jax.models.tiny import autoencoder
from lcm_jax.sharding import local_mesh

PIXELS = 2**20  # of one device's pictures: some 3 GB of SD's VAE at work in float32
MOST = 64  # of one device's pictures


def moments(spec, params, pictures, samples=None):
    """pictures [B,H,W,3] in -1..1 -> mean, logvar [B,h,w,C] float32 of their latents, unscaled.

    samples: as of `in_strips`.
    """

    def encode(x):
        return jnp.concatenate(autoencoder(spec).apply({'params': params}, x, method='encode'), -1)

    x = pictures.astype(jax.tree.leaves(params)[0].dtype)
    both = in_strips(encode, x, spec.factor, samples)
    return jnp.split(both.astype(jnp.float32), 2, -1)


def encoded(specs, params, batch, samples=None):
    """A batch of 'pixels' [B,H,W,3] uint8 and 'ids' [B,E,L] -> one of what the networks take.

    specs, params: of 'vae' and the text encoders, in their order. -> 'mean', 'logvar' [B,h,w,C]
    float32, 'context' [B,L,D] and for SDXL 'pooled' [B,P]; all else in the batch is passed on.
    """
    batch = dict(batch)
    mean, logvar = moments(specs['vae'], params['vae'], signed(batch.pop('pixels')), samples)
    parts = [part for part in specs if part.startswith('text_encoder')]
    ids = jnp.moveaxis(batch.pop('ids'), 1, 0)
    text = encode_text(
        tuple(specs[part] for part in parts), tuple(params[part] for part in parts), (*ids,)
    )
    return batch | {'mean': mean, 'logvar': logvar} | text


def encoder(model, dtype, vae_dtype):
    """Read a Model's VAE and text encoders -> fn(batch in numpy) -> the batch in numpy, `encoded`.

    All devices of this process encode a part of the batch each.
    """
    dtypes = dict.fromkeys(model.encoders, dtype) | {'vae': vae_dtype}
    mesh, devices = local_mesh(), jax.local_devices()
    whole, parts = (mesh and NamedSharding(mesh, P(*axes)) for axes in ((), ('data',)))
    params = model.load(model.encoders, dtypes, whole)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, batch, samples):
        return encoded(model.encoders, params, batch, samples)

    def encode(batch):
        n = len(batch['pixels'])
        more = -n % len(devices)
        full = {k: np.concatenate([x, np.repeat(x[:1], more, 0)]) for k, x in batch.items()}
        full = jax.device_put(full, parts)
        each = for_strips((n + more) // len(devices), devices[0].platform)
        out = run(params, full, each)
        return {k: np.asarray(x)[:n] for k, x in out.items()}

    return encode


def at_once(resolution, count):
    """How many of `count` samples `encoder` shall take at a time: what its devices have memory for."""
    each = max(1, min(MOST, PIXELS // resolution**2))
    return min(count, each * jax.local_device_count())


def batched(fn, x, batch=64):
    """fn over the rows of x in batches of one shape -> numpy tree."""
    padded = np.concatenate([x, np.repeat(x[:1], -len(x) % batch, 0)])
    parts = [jax.tree.map(np.asarray, fn(b)) for b in np.split(padded, len(padded) // batch)]
    return jax.tree.map(lambda *ys: np.concatenate(ys)[: len(x)], *parts)
