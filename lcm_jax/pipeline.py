"""Prompts -> pictures: a diffusers pipeline folder, sampled as one jitted program."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lcm_jax import lora as L
from lcm_jax import samplers
from lcm_jax.checkpoint import INDEX, SCHEDULER, Checkpoint, open_model
from lcm_jax.data import EMOJI
from lcm_jax.diffusion import KINDS, denoiser, guided, schedule
from lcm_jax.errors import InputError, choose, nearest
from lcm_jax.lora_io import read_lora
from lcm_jax.models import configs
from lcm_jax.models.clip import TextEncoder, TextSpec
from lcm_jax.models.unet import UNet, UNetSpec
from lcm_jax.models.vae import VAE, VAESpec
from lcm_jax.text import Tokenizer

LORAS = {'lcm': EMOJI / 'lcm_lora.safetensors'}
# Keys of scheduler_config.json with the only values that `schedule` computes.
SCHEDULER_ONLY = {
    'trained_betas': (None,),
    'rescale_betas_zero_snr': (False,),
    'thresholding': (False,),
}


class Adapter(NamedTuple):
    """A loaded LoRA."""

    lora: dict  # as `lora.init` makes it
    scale: float
    accelerates: bool  # made for few steps without guidance


@dataclasses.dataclass(eq=False)
class Pipeline:
    """Networks, their parameters and the noise schedule of one Stable Diffusion model.

    `params` are the base weights and never change; pictures are drawn with `merged`, the base UNet
    plus the scaled adapters.
    """

    checkpoint: Checkpoint
    unet: UNetSpec
    vae: VAESpec
    text: TextSpec
    params: dict[str, Any]  # 'unet', 'vae', 'text_encoder'
    tokenizer: Tokenizer
    abar: jax.Array
    prediction_type: str
    size: tuple[int, int]  # (height, width) px that pictures have by default
    merged: dict[str, Any]
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, name, dtype=jnp.float32):
        """'emoji' (shipped) or a diffusers folder -> Pipeline with parameters in `dtype`."""
        ckpt = open_model(name)
        configs.Config(
            ckpt.index, {'_class_name': ('StableDiffusionPipeline',)}, ckpt.folder / INDEX
        )
        noise = configs.Config(ckpt.scheduler, SCHEDULER_ONLY, ckpt.folder / SCHEDULER)
        kind = noise.get('prediction_type', 'epsilon')
        choose('prediction_type', kind, KINDS)
        specs = {part: ckpt.spec(part) for part in ('unet', 'vae', 'text_encoder')}
        params = {part: ckpt.load(part, dtype) for part in specs}
        grid = ckpt.configs['unet'].get('sample_size') or 64
        height, width = grid if isinstance(grid, list) else (grid, grid)
        return cls(
            ckpt,
            specs['unet'],
            specs['vae'],
            specs['text_encoder'],
            params,
            Tokenizer(ckpt.tokenizer()),
            schedule(
                noise['beta_schedule'],
                noise['beta_start'],
                noise['beta_end'],
                noise['num_train_timesteps'],
            ),
            kind,
            (height * specs['vae'].factor, width * specs['vae'].factor),
            params['unet'],
        )

    def net(self, params, z, t, context):
        """The UNet with these parameters: z [B,h,w,C], t [B], context [B,L,D] -> [B,h,w,C]."""
        return UNet(self.unet).apply({'params': params}, z.astype(context.dtype), t, context)

    def encode_text(self, prompts):
        """[B] str -> context [B,L,D]. Raises InputError for a prompt over the model's length."""
        return _encode_text(self.text, self.params['text_encoder'], self.tokenizer(prompts))

    def latent_shape(self, size=None):
        """(height, width) in px, default the model's own -> (h, w, C) of a latent."""
        height, width = size or self.size
        multiple = self.vae.factor * 2 ** (len(self.unet.widths) - 1)
        if min(height, width) < multiple or height % multiple or width % multiple:
            raise InputError(f'size {height} x {width}: both must be multiples of {multiple} px')
        return height // self.vae.factor, width // self.vae.factor, self.vae.latent_channels

    def add_lora(self, file, name=None, scale=1.0):
        """Add a LoRA file ('lcm': the shipped one) under `name`, default its stem, at `scale`.

        It counts as an acceleration LoRA, which changes the defaults of drawing, if its metadata
        says so or `name` contains 'lcm'. Raises InputError unless the whole of it fits the model.
        """
        name = name or Path(file).stem
        if name in self.adapters:
            raise InputError(
                f'a LoRA named {name!r} is loaded already; give it another name than '
                f'{", ".join(self.adapters)}'
            )
        path = Path(LORAS.get(str(file), file))
        if not path.is_file():
            raise InputError(
                f'{str(file)!r} is neither a shipped LoRA ({", ".join(LORAS)})'
                f'{nearest(file, LORAS)} nor a file'
            )
        lora, metadata = read_lora(path, self.params['unet'])
        accelerates = metadata.get('lcm_jax.accelerates') == 'true' or 'lcm' in name.lower()
        self.adapters[name] = Adapter(jax.tree.map(jnp.asarray, lora), scale, accelerates)
        self._remerge()

    def set_scale(self, name, scale):
        """Change the scale of a loaded LoRA; nothing is compiled anew."""
        self.adapters[name] = choose('LoRA', name, self.adapters)._replace(scale=scale)
        self._remerge()

    def remove_lora(self, name):
        """Take a loaded LoRA away."""
        choose('LoRA', name, self.adapters)
        del self.adapters[name]
        self._remerge()

    def with_lora(self, lora):
        """A Pipeline that shares these weights and draws with this acceleration LoRA alone."""
        other = dataclasses.replace(self, adapters={'live': Adapter(lora, 1.0, True)})
        other._remerge()
        return other

    def _remerge(self):
        self.merged = self.params['unet']
        for lora, scale, _ in self.adapters.values():
            self.merged = _merge(self.merged, lora, float(scale))

    def __call__(
        self,
        prompt,
        *,
        steps=None,
        sampler=None,
        guidance=None,
        negative=None,
        seed=0,
        count=1,
        size=None,
        latents=None,
        timesteps=None,
    ):
        """Draw `count` pictures of each prompt -> list of PIL images, prompt by prompt.

        prompt: str or list of str; negative: str, used only when guidance > 1.
        sampler: 'ddim', 'dpm', 'dpm++' or 'lcm'; steps: how many network steps; timesteps: falling
        list of ints that replaces the sampler's own. guidance has diffusers' meaning (1: none).
        The default is 'lcm' with 4 steps and guidance 1 when an acceleration LoRA is loaded, 'ddim'
        with 50 steps and guidance 7.5 otherwise.
        size: (height, width) px. latents: start noise [N,h,w,C] float32 in place of the seed's.
        Picture i of the list depends on the seed, i and its prompt, not on how many others are
        drawn. Raises InputError for what is out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or count < 1:
            raise InputError(
                f'nothing to draw: {len(prompts)} prompts, count = {count}; both must be 1 or more'
            )
        if not 0 <= seed < 2**32:
            raise InputError(f'seed = {seed}; a whole number from 0 to {2**32 - 1}')
        fast = any(a.accelerates and a.scale for a in self.adapters.values())
        sampler = sampler or ('lcm' if fast else 'ddim')
        guidance = float((1 if fast else 7.5) if guidance is None else guidance)
        if fast and guidance > 2:
            warnings.warn(
                f'guidance {guidance:g} with an acceleration LoRA burns pictures; use 1 to 2',
                stacklevel=2,
            )
        if negative and guidance <= 1:
            warnings.warn(
                f'the negative prompt has no effect at guidance {guidance:g}; it acts above 1',
                stacklevel=2,
            )
        if timesteps is None:
            steps = (4 if sampler == 'lcm' else 50) if steps is None else steps
            times = samplers.times(sampler, steps, len(self.abar))
        else:
            times = samplers.custom_times(sampler, timesteps, len(self.abar), steps)
        shape = (len(prompts) * count, *self.latent_shape(size))
        keys = _keys(np.uint32(seed), shape[0])
        if latents is None:
            latents = samplers.fresh(keys)(len(self.abar), shape)  # a number that no step has
        elif np.shape(latents) != shape:
            raise InputError(f'latents of shape {np.shape(latents)}; these pictures need {shape}')
        context = jnp.repeat(self.encode_text(prompts), count, 0)
        if guidance > 1:
            null = self.encode_text([negative or ''])
            context = jnp.concatenate([context, jnp.broadcast_to(null, context.shape)])
        pictures = self.draw(
            self.merged,
            jnp.asarray(latents, jnp.float32),
            context,
            times,
            keys,
            guidance,
            sampler=sampler,
        )
        return [Image.fromarray(p) for p in np.asarray(pictures)]

    def draw(self, unet_params, latents, context, times, keys, guidance, *, sampler):
        """latents [B,h,w,C], context [B,L,D] (guided: [2B,L,D]) -> pictures [B,H,W,3] uint8.

        One program per sampler, shapes and number of steps; everything else is traced.
        """
        return _draw(
            self.unet,
            self.vae,
            self.prediction_type,
            sampler,
            unet_params,
            self.params['vae'],
            self.abar,
            latents,
            context,
            jnp.asarray(times),
            keys,
            guidance,
        )


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(spec, params, ids):
    return TextEncoder(spec).apply({'params': params}, ids).hidden


@jax.jit
def _merge(params, lora, scale):
    return L.merge(params, lora, scale)


@functools.partial(jax.jit, static_argnums=1)
def _keys(seed, n):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(n))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    unet, vae, kind, sampler, unet_params, vae_params, abar, latents, context, times, keys, guidance
):
    def net(z, t):
        return UNet(unet).apply({'params': unet_params}, z.astype(context.dtype), t, context)

    model = denoiser(net, kind, abar)
    if len(context) == 2 * len(latents):
        model = guided(model, guidance)
    solver = samplers.SAMPLERS[sampler].solver(len(times) - 1)
    z = samplers.sample(model, solver, latents, times, abar, samplers.fresh(keys))
    return decode(vae, vae_params, z)


def decode(vae, params, z):
    """Scaled latents [B,h,w,C] -> pictures [B,H,W,3] uint8, rounded as diffusers does."""
    z = (z / vae.scaling_factor).astype(jax.tree.leaves(params)[0].dtype)
    x = VAE(vae).apply({'params': params}, z, method='decode').astype(jnp.float32)
    return jnp.round(255 * jnp.clip(x / 2 + 0.5, 0, 1)).astype(jnp.uint8)
