"""Attention, chosen in one place."""

import jax


def attend(q, k, v, *, causal=False):
    """softmax(q k^T / sqrt(D)) v. q [B,L,H,D], k and v [B,M,H,D] -> [B,L,H,D]."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)
