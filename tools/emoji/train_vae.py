"""Train the emoji autoencoder on all three styles and write it as diffusers' `vae` folder.

    python tools/emoji/train_vae.py --workdir runs/vae
    python tools/emoji/train_vae.py --workdir runs/vae_decoder --decoder-only --lr 5e-4

The second line trains on from the written folder with the encoder fixed, so that latents (and what
was trained on them) stay as they are. Both resume from their workdir, and print the held-out
reconstruction PSNR at each checkpoint.
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_loop

from lcm_jax import weights
from lcm_jax.checkpoint import open_folder
from lcm_jax.data.emoji import emoji
from lcm_jax.data.order import shuffled
from lcm_jax.encode import batched
from lcm_jax.images import signed
from lcm_jax.models.configs import vae_config
from lcm_jax.models.vae import VAE, VAESpec
from lcm_jax.tensors import write_tensors

SPEC = VAESpec(
    widths=(16, 32, 64, 128), resnets=1, latent_channels=16, groups=8, scaling_factor=1.0
)


def augment(x, rng, pad=4):
    """Random flip and shift (white border) of pictures [B,H,W,3] uint8."""
    size = x.shape[1]
    wide = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=255)
    i, j = rng.integers(0, 2 * pad + 1, (2, len(x)))
    out = np.stack([p[a : a + size, b : b + size] for p, a, b in zip(wide, i, j, strict=True)])
    flip = rng.random(len(x)) < 0.5
    out[flip] = out[flip, :, ::-1]
    return out


def loss(params, ema, frozen, x, key, kl_weight=1e-4):
    """L1 + L2 reconstruction and the posterior's KL to the unit Gaussian, mean per element.

    The VAE's parameters are `params`, trained, and `frozen`.
    """
    params = {**params, **frozen}
    vae = VAE(SPEC)
    mean, logvar = vae.apply({'params': params}, x, method='encode')
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = vae.apply({'params': params}, z, method='decode') - x
    l2, kl = jnp.mean(error**2), 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
    return jnp.mean(jnp.abs(error)) + l2 + kl_weight * kl


@jax.jit
def reconstruct(params, x):
    return jnp.clip(VAE(SPEC).apply({'params': params}, x), -1, 1)


def psnr(params, x):
    """Mean PSNR over pictures, dB."""
    mse = np.mean((batched(partial(reconstruct, params), x) - x) ** 2, (1, 2, 3))
    return float(np.mean(10 * np.log10(4 / mse)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--out', default='lcm_jax/emoji/pipeline/vae')
    parser.add_argument('--decoder-only', action='store_true')
    parser.add_argument('--steps', type=int, default=4000)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--lr', type=float, default=1.5e-3)
    args = parser.parse_args()

    pictures = np.stack([s.picture for s in emoji('train')])
    heldout = signed(np.stack([s.picture for s in emoji('heldout')]))
    indices = shuffled(len(pictures), args.batch, 0)

    def batch_at(i):
        return signed(augment(pictures[indices(i)], np.random.default_rng((1, i))))

    out = Path(args.out)
    if args.decoder_only:
        parts = open_folder(out.parent)
        spec, params = parts.spec(out.name), parts.load(out.name)
        frozen = {name: params.pop(name) for name in ('encoder', 'quant_conv')}
    else:
        params = jax.jit(VAE(SPEC).init)(jax.random.key(0), batch_at(0))['params']
        spec, frozen = None, {}
    warmup = min(100, args.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0, args.lr, warmup, args.steps, args.lr / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-3))

    def report(i, state):
        return {'heldout_psnr': psnr({**state.ema, **frozen}, heldout)}

    options = {'ema_decay': 0.998, 'save_every': 500, 'report': report}
    state = small_loop.train(loss, tx, params, frozen, batch_at, args, **options)

    params = {**state.ema, **frozen}
    if spec is None:  # the encoder is new: measure the scale of its latents
        encode = jax.jit(lambda p, x: VAE(SPEC).apply({'params': p}, x, method='encode')[0])
        std = float(np.std(batched(partial(encode, params), signed(pictures[::4]))))
        spec = dataclasses.replace(SPEC, scaling_factor=round(1 / std, 5))
    write_tensors(
        out / 'diffusion_pytorch_model.safetensors',
        weights.dump(optax.tree.cast(params, jnp.float16)),
    )
    (out / 'config.json').write_text(json.dumps(vae_config(spec, 64), indent=2) + '\n')
    print(f'wrote {out}; scaling factor {spec.scaling_factor}')


if __name__ == '__main__':
    main()
