"""Fused attention on TPUs: JAX's splash kernel, run by each device for its own samples or heads."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

LANES = 128  # the kernel takes keys and queries by multiples of these
BLOCKS = (512, 384, 256, 128)  # tokens at a time: the first that divides their number


@partial(jax.jit, static_argnames='interpret')  # traced once for all layers of one shape
def flash_attention(q, k, v, *, interpret=False):
    """softmax(q k^T / sqrt(D)) v. q [B,L,H,D], k and v [B,M,H,D] -> [B,L,H,D].

    XLA cannot divide a kernel. Where the arrays lie on a mesh, each of its axes divides the batch
    or else the heads; an axis that divides neither repeats the work.
    `interpret` computes what the kernel would on any platform, slowly.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    run, mesh = partial(_attention, interpret=interpret), jax.typeof(q).sharding.mesh
    axes = {axis: n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes}
    if axes:
        spec = _divide(axes, q.shape[:2])
        run = jax.shard_map(
            run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={*axes}, check_vma=False
        )
    return run(q, k, v).swapaxes(1, 2)


def _divide(axes, lengths):
    """Mesh axes {name: size} -> PartitionSpec: each at the first dimension that it still divides."""
    lengths, names = list(lengths), [() for _ in lengths]
    for axis, size in axes.items():
        i = next((i for i, n in enumerate(lengths) if n % size == 0), None)
        if i is not None:
            lengths[i] //= size
            names[i] += (axis,)
    return PartitionSpec(*names)


def _attention(q, k, v, *, interpret):
    """q [B,H,L,D], k and v [B,H,M,D] -> [B,H,L,D], on one device."""
    # Here, as importing them takes half as long as JAX itself, and small pictures never come here.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    l, m = q.shape[2], k.shape[2]
    k = (k.astype(jnp.float32) * k.shape[3] ** -0.5).astype(k.dtype)  # texts have few
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0))) for x in (q, k, v))
    queries, keys = (next(n for n in BLOCKS if x.shape[2] % n == 0) for x in (q, k))
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
        # Tokens minor, as a projection's product can be written without a transposition.
        q_layout=splash.QKVLayout.SEQ_MINOR,
        k_layout=splash.QKVLayout.SEQ_MINOR,
        v_layout=splash.QKVLayout.SEQ_MINOR,
    )
    everything = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * q.shape[1])
    kernel = splash.make_splash_mha_single_device(
        everything, block_sizes=sizes, interpret=interpret
    )
    segments = None
    if m % LANES:  # tokens of one segment see each other: here all that are not padding of the keys
        padding = jnp.arange(k.shape[2]) >= m
        segments = splash.SegmentIds(jnp.zeros(q.shape[2], jnp.int32), padding.astype(jnp.int32))
    return jax.vmap(kernel, (0, 0, 0, None))(q, k, v, segments)[:, :, :l]
