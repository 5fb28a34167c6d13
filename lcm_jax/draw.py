"""The jitted program that draws: pictures in, the sampling loop, pictures out."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax import samplers
from lcm_jax.conditioning import guidance_embedding
from lcm_jax.diffusion import alpha_sigma, denoiser, guided, side_by_side
from lcm_jax.encode import moments
from lcm_jax.errors import InputError
from lcm_jax.models.layers import for_strips, in_strips
from lcm_jax.models.tiny import TinySpec, autoencoder
from lcm_jax.models.unet import UNet, UNetSpec
from lcm_jax.models.vae import VAESpec

# What is checked to be finite, in the order it is computed.
PARTS = ('text encoder', 'VAE encoder', 'UNet', 'VAE decoder')


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program is compiled for, besides shapes and the number of steps."""

    unet: UNetSpec
    vae: VAESpec | TinySpec
    prediction_type: str
    sampler: str
    low_end: bool  # see `samplers.low_end`
    platform: str  # 'tpu' cuts pictures into strips
    mesh: Mesh | None = None  # each device along its 'data' axis draws its part of the batch

    def samples(self, n):
        """`for_strips` of n samples."""
        return for_strips(n, self.platform)


@partial(jax.jit, static_argnums=0)
def draw(plan, params, abar, rows, pictures, times, guidance, pure):
    """-> pictures [N,H,W,3] uint8, finite [N, len(PARTS)] bool.

    params: of 'unet' and 'vae'. rows, [N, ...] each: 'noise' [N,h,w,C], 'keys', the condition
    'cond' and, for guidance, the null condition 'null' (see `conditioning`). pictures, [N, ...] or
    [1, ...] each, say what is drawn:

    - {}: pictures from text alone;
    - 'image' [.,H,W,3] in -1..1: pictures from it, noised to the first of `times`;
    - 'image' and 'mask' [.,h,w,1]: inpainting by a UNet that knows nothing of masks. After every
      step the latents outside the mask are put back, with the noise of that step;
    - 'mask' and 'masked' [.,H,W,3], the picture without what the mask covers: inpainting by a UNet
      that takes both as further channels; with 'image', starting from that.

    times [n+1] int32; guidance: scalar; pure: start from noise alone even though 'image' is given.
    """
    run = partial(_draw, plan)
    if plan.mesh is not None:
        whole, split = PartitionSpec(), PartitionSpec('data')
        n = len(rows['noise'])
        placed = jax.tree.map(lambda x: split if len(x) == n else whole, pictures)
        run = jax.shard_map(
            run,
            mesh=plan.mesh,
            axis_names={'data'},
            in_specs=(whole, whole, split, placed, whole, whole, whole),
            out_specs=split,
            check_vma=False,
        )
    return run(params, abar, rows, pictures, times, guidance, pure)


def on_mesh(mesh, rows, pictures):
    """`draw`'s rows and pictures laid out on the mesh in equal parts: repeated until they are."""
    if mesh is None:
        return rows, pictures
    n = len(rows['noise'])
    each = np.arange(n + -n % mesh.shape['data']) % n
    pictures = {k: x if len(x) == 1 else x[each] for k, x in pictures.items()}
    rows = jax.tree.map(lambda x: x[each], rows)
    return jax.device_put(rows, NamedSharding(mesh, PartitionSpec('data'))), pictures


def check_finite(finite, params):
    """finite as `draw` gives it. InputError that names the first part that failed, and its dtype."""
    finite = np.asarray(finite)
    if finite.all():
        return
    part = PARTS[int(np.argmin(finite.all(0)))]
    name, option = ('vae', 'vae_dtype') if 'VAE' in part else ('unet', 'dtype')
    dtype = jax.tree.leaves(params[name])[0].dtype
    advice = (
        'look for broken weights, and for LoRA scales or guidance that are too high'
        if dtype == jnp.float32
        else f'load the model with {option} float32'
    )
    raise InputError(
        f'{(~finite.all(1)).sum()} of {len(finite)} pictures are not finite: the {part} gave NaN '
        f'or infinity in {dtype}; {advice}'
    )


def _draw(plan, params, abar, rows, pictures, times, guidance, pure):
    noise, z, mask = samplers.fresh(rows['keys']), rows['noise'], pictures.get('mask')
    latents = {}
    for i, name in enumerate(('image', 'masked')):
        if name in pictures:  # each from noise of its own, beyond that of the steps
            x, own = pictures[name], noise(len(abar) + 1 + i, z.shape)
            latents[name] = encode(plan.vae, params['vae'], x, own, plan.samples(len(x)))
    start, keep, channels = z, lambda z, s: z, ()
    if 'image' in latents:

        def noised(t):
            alpha, sigma = alpha_sigma(abar, t)
            return alpha * latents['image'] + sigma * z

        start = jnp.where(pure, z, noised(times[0]))
    if 'masked' in latents:
        channels = jnp.broadcast_to(mask, (*z.shape[:-1], 1)), latents['masked']
    elif mask is not None:

        def keep(z, s):
            return (1 - mask) * noised(s) + mask * z

    model = _model(plan, params['unet'], abar, rows, channels, guidance)
    solver = samplers.SAMPLERS[plan.sampler].solver(plan.low_end)
    end = samplers.sample(model, solver, start, times, abar, noise, keep)
    x = decode(plan.vae, params['vae'], end, plan.samples(len(end)))
    finite = [_finite(part, len(z)) for part in (rows['cond'], latents, end, x)]
    return to_uint8(x), jnp.stack(finite, 1)


def _model(plan, params, abar, rows, channels, guidance):
    """-> the function (z, t) -> Pred that the solver sees, guided where there is a null condition."""
    cond, null = rows['cond'], rows.get('null')
    if plan.unet.w_dim:
        w = jnp.full(len(rows['noise']), guidance - 1.0)
        cond = cond | {'w': guidance_embedding(w, plan.unet.w_dim)}
    if null is not None:
        cond = jax.tree.map(side_by_side, cond, null)
        channels = [side_by_side(c, c) for c in channels]

    def net(z, t):
        z = jnp.concatenate([z, *channels], -1)

        def run(z):
            return apply_unet(UNet(plan.unet), params, z, t, **cond)

        return in_strips(run, z, plan.unet.factor, plan.samples(len(z)))

    model = denoiser(net, plan.prediction_type, abar)
    return model if null is None else guided(model, guidance)


def apply_unet(unet, params, z, t, context, **cond):
    """A UNet module with these parameters, at the context's precision -> [B,h,w,C]."""
    dtype = context.dtype
    cond = {k: c if k == 'sizes' else c.astype(dtype) for k, c in cond.items()}
    return unet.apply({'params': params}, z.astype(dtype), t, context, **cond)


def encode(spec, params, pictures, noise, samples=None):
    """pictures [.,H,W,3] in -1..1, noise [N,h,w,C] -> scaled latents [N,h,w,C], drawn by it.

    samples: as of `in_strips`.
    """
    mean, logvar = moments(spec, params, pictures, samples)
    return spec.scaling_factor * (mean + jnp.exp(0.5 * logvar) * noise)


def decode(spec, params, z, samples=None):
    """Scaled latents [B,h,w,C] -> pictures [B,H,W,3] float32, in -1..1 but for overshoot.

    samples: as of `in_strips`.
    """
    z = (z / spec.scaling_factor).astype(jax.tree.leaves(params)[0].dtype)

    def pictures(z):
        return autoencoder(spec).apply({'params': params}, z, method='decode')

    return in_strips(pictures, z, 1, samples).astype(jnp.float32)


def to_uint8(x):
    """Pictures in -1..1 -> uint8, rounded as diffusers does."""
    return jnp.round(255 * jnp.clip(x / 2 + 0.5, 0, 1)).astype(jnp.uint8)


def _finite(tree, n):
    """Tree of arrays [N, ...] -> [N] bool: all numbers of the row are finite."""
    rows = [jnp.isfinite(x).reshape(len(x), -1).all(1) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack([jnp.ones(n, bool), *rows]), 0)
