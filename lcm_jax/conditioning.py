"""What the UNet is told besides the latents and the time: text, sizes, guidance.

One set of functions for training and sampling. A condition is a dict of `UNet.__call__`'s keyword
arguments: 'context', and where the model has them 'pooled', 'sizes' and 'w'.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.models.clip import TextEncoder

TEXT_ENCODERS = ('text_encoder', 'text_encoder_2')  # in the order their outputs are joined


def micro_conditioning(original, crop, target):
    """SDXL's sizes (arXiv 2307.01952, section 2.2) -> [6] float32.

    Each is (height, width) or (top, left), in px: `original` the picture before it was resized,
    `crop` the corner of what was cut out of it after resizing, `target` the size it is now. Heights
    come first throughout, as in diffusers' `_get_add_time_ids`. A flip from left to right moves the
    corner: with W the resized and w the cut width, left becomes W - w - left.
    """
    pairs = [tuple(pair) for pair in (original, crop, target)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f'sizes {pairs}: (height, width), (top, left) and (height, width)')
    return np.asarray(pairs, np.float32).reshape(6)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode_text(specs, params, ids, skip=0):
    """The text half of a condition -> {'context': [B,L,D]}, with 'pooled' [B,P] from two encoders.

    specs, params, ids [B,L] int: tuples with an entry for each text encoder. One encoder gives its
    final hidden states (SD 1.x, 2.x); of two, both penultimate ones are joined and the second's
    projection is the pooled text (SDXL). skip: diffusers' `clip_skip`, layers left out beyond that.
    """
    outs = [
        TextEncoder(spec).apply({'params': p}, i, skip)
        for spec, p, i in zip(specs, params, ids, strict=True)
    ]
    if len(outs) == 1:
        return {'context': outs[0].hidden}
    context = jnp.concatenate([out.penultimate for out in outs], -1)
    return {'context': context, 'pooled': outs[-1].pooled}


def guidance_embedding(w, dim):
    """w [B], guidance in the papers' convention (the usual scale less 1) -> [B,dim] float32.

    What a w-conditioned LCM's UNet is told: sines first (diffusers `get_guidance_scale_embedding`).
    """
    half = dim // 2
    freq = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - 1))
    angle = 1000.0 * w[:, None].astype(jnp.float32) * freq
    return jnp.pad(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1), ((0, 0), (0, dim % 2)))
