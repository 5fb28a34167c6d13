"""Train the emoji teacher: an epsilon-predicting UNet on the Noto and Twemoji pictures.

    python tools/emoji/train_teacher.py --workdir runs/teacher

Needs `text_encoder` and `vae` (train_clip.py, train_vae.py) in the pipeline folder and completes
it. Resumes from its workdir. 10 % of the captions are dropped for classifier-free guidance.
--start goes on from the UNet of a pipeline folder, with a new optimizer and rate schedule.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_loop
from captions import variant
from PIL import Image

from lcm_jax import weights
from lcm_jax.checkpoint import open_folder
from lcm_jax.conditioning import encode_text
from lcm_jax.data.emoji import emoji
from lcm_jax.data.order import shuffled
from lcm_jax.diffusion import schedule
from lcm_jax.distill import Draws, Nets, Noise, denoise
from lcm_jax.encode import batched, moments
from lcm_jax.images import signed
from lcm_jax.models.configs import unet_config
from lcm_jax.models.unet import UNet, UNetSpec
from lcm_jax.pipeline import Pipeline
from lcm_jax.tensors import write_tensors
from lcm_jax.tree import count

STYLES = ('noto', 'twemoji')
VARIANTS = 6  # ways of saying each caption
SCHEDULER = {
    '_class_name': 'DDIMScheduler',
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'num_train_timesteps': 1000,
    'prediction_type': 'epsilon',
    'set_alpha_to_one': False,
    'steps_offset': 1,
    'clip_sample': False,
    'timestep_spacing': 'leading',
}
INDEX = {
    '_class_name': 'StableDiffusionPipeline',
    'unet': ['diffusers', 'UNet2DConditionModel'],
    'vae': ['diffusers', 'AutoencoderKL'],
    'text_encoder': ['transformers', 'CLIPTextModel'],
    'tokenizer': ['transformers', 'CLIPTokenizer'],
    'scheduler': ['diffusers', 'DDIMScheduler'],
    'image_encoder': ['transformers', 'CLIPVisionModelWithProjection'],
    'feature_extractor': ['transformers', 'CLIPImageProcessor'],
    'safety_checker': [None, None],
    'requires_safety_checker': False,
}
PROCESSOR = {
    'image_processor_type': 'CLIPImageProcessor',
    'size': {'shortest_edge': 64},
    'crop_size': {'height': 64, 'width': 64},
    'image_mean': [0.5] * 3,
    'image_std': [0.5] * 3,
    'do_resize': True,
    'do_center_crop': True,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'do_convert_rgb': True,
    'resample': 3,
}
PROMPTS = (
    'red heart, noto emoji',
    'grinning cat, twemoji',
    'sun, noto emoji',
    'green apple, twemoji',
    'airplane, noto emoji',
    'robot, twemoji',
    'blue heart, twemoji',
    'a fish, noto emoji',
)


def spec_for(context_dim, latent_channels):
    return UNetSpec(
        widths=(128, 128),
        down=((1,), (1,)),
        mid=1,
        up=((1, 1), (1, 1)),
        heads=(4, 4),
        context_dim=context_dim,
        linear_proj=True,
        in_channels=latent_channels,
        out_channels=latent_channels,
        groups=16,
    )


def loss(params, ema, frozen, batch, key, *, spec, scaling, min_snr, drop=0.1):
    """Squared error of the noise, times min(SNR, min_snr) / SNR (arXiv 2303.09556), with uniform times."""
    mean, std, texts, null = frozen
    samples, variants = batch
    keys = jax.random.split(key, 4)
    z = mean[samples].astype(jnp.float32)
    z = scaling * (z + std[samples] * jax.random.normal(keys[0], z.shape))
    context = texts[samples, variants].astype(jnp.float32)
    context = jnp.where(jax.random.bernoulli(keys[1], drop, (len(z), 1, 1)), null, context)
    t = jax.random.randint(keys[2], (len(z),), 0, 1000)
    eps = jax.random.normal(keys[3], z.shape)
    nets = Nets(partial(UNet(spec).apply, {'params': params}), None, None)
    told, noise = {'z': z, 'cond': {'context': context}}, Noise(schedule(), 'epsilon')
    return jnp.mean(denoise(nets, told, Draws(eps, t, None, None), noise, min_snr=min_snr))


def encoded(folder):
    """The training set through VAE and text encoder.

    -> (vae spec, text spec, (mean, std [N,h,w,C], texts [N,VARIANTS,L,D], null [L,D]) in float16)
    """
    parts = open_folder(folder)
    vae, vae_params = parts.spec('vae'), parts.load('vae')
    text, text_params = parts.spec('text_encoder'), parts.load('text_encoder')
    samples, rng = emoji('train', STYLES), np.random.default_rng(0)
    tokenizer = parts.tokenizer()
    encode = jax.jit(lambda x: moments(vae, vae_params, x))

    def read(captions):
        def one(some):
            return encode_text((text,), (text_params,), (tokenizer(some.tolist()),))

        return batched(one, np.array(captions, object))['context']

    said = [[s.caption, *(variant(s.caption, rng) for _ in range(VARIANTS - 1))] for s in samples]
    mean, logvar = batched(lambda x: encode(signed(x)), np.stack([s.picture for s in samples]))
    frozen = (
        mean,
        np.exp(0.5 * logvar),
        np.stack([read(column) for column in zip(*said, strict=True)], 1),
        read([''])[0],
    )
    return vae, text, jax.tree.map(lambda x: jnp.asarray(x, jnp.float16), frozen)


def write_folder(folder, spec, params):
    """The UNet and what makes the folder a pipeline."""
    write_tensors(
        folder / 'unet' / 'diffusion_pytorch_model.safetensors',
        weights.dump(optax.tree.cast(params, jnp.float16)),
    )
    for name, value in (
        ('unet/config.json', unet_config(spec, 8)),
        ('model_index.json', INDEX),
        ('scheduler/scheduler_config.json', SCHEDULER),
        ('feature_extractor/preprocessor_config.json', PROCESSOR),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2) + '\n')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--out', default='lcm_jax/emoji/pipeline')
    parser.add_argument('--steps', type=int, default=9000)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--min-snr', type=float, default=float('inf'), help='gamma; default: off')
    parser.add_argument('--start', help='pipeline folder whose UNet training goes on from')
    args = parser.parse_args()
    folder = Path(args.out)

    vae, text, frozen = encoded(folder)
    n = len(frozen[0])
    spec = spec_for(text.width, vae.latent_channels)
    indices = shuffled(n, args.batch, 0)

    def batch_at(i):
        return indices(i), np.random.default_rng((1, i)).integers(0, VARIANTS, args.batch)

    if args.start:
        params = open_folder(args.start).load('unet')
    else:
        z = jnp.zeros((1, 8, 8, vae.latent_channels))
        variables = jax.jit(UNet(spec).init)(
            jax.random.key(0), z, jnp.zeros(1, int), frozen[3][None]
        )
        params = variables['params']
    params = optax.tree.cast(params, jnp.float32)
    print(f'{n} pictures, {count(params):,} parameters')
    rate = optax.warmup_cosine_decay_schedule(
        0, args.lr, args.steps // 40, args.steps, args.lr / 100
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))

    def show(i, state):
        write_folder(folder, spec, state.ema)
        pictures = Pipeline.load(folder)(list(PROMPTS), steps=25, guidance=3.0)
        strip = np.concatenate([np.asarray(p) for p in pictures], 1)
        Image.fromarray(strip).save(Path(args.workdir) / f'{i:06d}.png')
        return {}

    options = {'ema_decay': 0.999, 'save_every': 1000, 'log_every': 50, 'report': show}
    small_loop.train(
        partial(loss, spec=spec, scaling=vae.scaling_factor, min_snr=args.min_snr),
        tx,
        params,
        frozen,
        batch_at,
        args,
        **options,
    )


if __name__ == '__main__':
    main()
