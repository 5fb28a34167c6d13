"""Attention, chosen in one place: by size here, by platform when the program is lowered."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lcm_jax.models.flash import flash_attention

# Above SMALL scores a head, queries go in chunks whose BLOCK scores (8 MB in float32) stay in cache.
SMALL = 2**17
SMALL_TPU = 2**14  # a block of its kernel
BLOCK = 2**21
CUDNN = 8.0  # compute capability that its fused attention needs: Ampere's


def attend(q, k, v, *, causal=False):
    """softmax(q k^T / sqrt(D)) v. q [B,L,H,D], k and v [B,M,H,D] -> [B,L,H,D].

    Memory grows with L + M, not with L * M, in the backward pass too.
    """

    def chunked(each):
        def run(q, k, v):
            b, l, h, d = q.shape
            q, k, v = (x.swapaxes(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
            out = each(lambda x: _head(*x, causal))((q, k, v))
            return out.reshape(b, h, l, d).swapaxes(1, 2)

        return run

    plain = partial(jax.nn.dot_product_attention, is_causal=causal)
    scores = q.shape[1] * k.shape[1]  # of one head
    if scores <= SMALL:
        paths = {'default': plain}
        if q.dtype == jnp.float16:  # which JAX's own function cannot multiply on CPUs
            paths['cpu'] = lambda *x: plain(*(y.astype(jnp.float32) for y in x)).astype(q.dtype)
    else:
        # A CPU's caches hold one head at a time; elsewhere heads (or shards of them) go side by side.
        paths = {'cpu': chunked(lambda f: lambda x: lax.map(f, x)), 'default': chunked(jax.vmap)}
        if _fits_cudnn(q):
            paths['cuda'] = partial(plain, implementation='cudnn')
    if scores > SMALL_TPU and not causal:
        paths['tpu'] = flash_attention
    return lax.platform_dependent(q, k, v, **paths) if len(paths) > 1 else plain(q, k, v)


def _head(q, k, v, causal):
    """One head: q [L,D], k and v [M,D] -> [L,D], a block of queries at a time."""
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)  # their gradients add up over the blocks

    def row(x):
        i, q = x
        s = jnp.einsum('d,md->m', q, k.astype(q.dtype), preferred_element_type=jnp.float32)
        if causal:
            s = jnp.where(jnp.arange(s.size) <= i, s, -jnp.inf)
        p = jnp.exp(q.size**-0.5 * (s - lax.stop_gradient(s.max())))
        # In half precision too: rounding p would spoil the gradient, a difference of large terms.
        return (jnp.einsum('m,md->d', p, v) / p.sum()).astype(q.dtype)

    # The backward pass computes a block's scores again rather than keep them all.
    row = jax.checkpoint(row, prevent_cse=False)
    return lax.map(row, (jnp.arange(len(q)), q), batch_size=max(1, BLOCK // len(k)))


def _fits_cudnn(q):
    """Whether cuDNN's fused kernel is here and takes heads like these."""
    if q.dtype not in (jnp.float16, jnp.bfloat16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    try:
        return all(float(x.compute_capability) >= CUDNN for x in jax.devices('cuda'))
    except RuntimeError:
        return False
