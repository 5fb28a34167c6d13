"""Prompts, and pictures if you like -> pictures: a Stable Diffusion model and what one may ask of it."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax import images, samplers
from lcm_jax import lora as L
from lcm_jax.checkpoint import INDEX, SCHEDULER, Checkpoint, open_model, open_part
from lcm_jax.conditioning import TEXT_ENCODERS, encode_text, micro_conditioning
from lcm_jax.data import EMOJI
from lcm_jax.draw import PARTS, Plan, apply_unet, draw
from lcm_jax.errors import InputError, choose, nearest
from lcm_jax.lora_io import read_lora
from lcm_jax.models.configs import Config
from lcm_jax.scheduler import Schedule, read_schedule
from lcm_jax.text import Tokenizer
from lcm_jax.tree import map_named

LORAS = {'lcm': EMOJI / 'lcm_lora.safetensors'}


class Family(NamedTuple):
    """What a class of model_index.json says beyond its components' own configs."""

    text_encoders: tuple[str, ...]
    guidance: float  # default without an acceleration LoRA, diffusers'
    zero_null: bool = False  # no negative prompt: zeros (True) or the empty prompt's embedding


SD = Family(TEXT_ENCODERS[:1], 7.5)
SDXL = Family(TEXT_ENCODERS, 5.0, True)
LCM = Family(TEXT_ENCODERS[:1], 8.5)
FAMILIES = {
    'StableDiffusionPipeline': SD,
    'StableDiffusionImg2ImgPipeline': SD,
    'StableDiffusionInpaintPipeline': SD,
    'StableDiffusionXLPipeline': SDXL,
    'StableDiffusionXLImg2ImgPipeline': SDXL,
    'StableDiffusionXLInpaintPipeline': SDXL,
    'LatentConsistencyModelPipeline': LCM,
    'LatentConsistencyModelImg2ImgPipeline': LCM,
}
# Keys of model_index.json with the only values that are drawn as the model means them. Components
# that are not named here or by the family (safety checker, image encoder, ...) are left aside.
INDEX_ONLY = {'_class_name': tuple(FAMILIES), 'requires_aesthetics_score': (False,)}


class Adapter(NamedTuple):
    """A loaded LoRA."""

    lora: dict[str, dict]  # component -> adapter, as `lora.init` makes it
    scale: float
    accelerates: bool  # made for few steps without guidance


@dataclasses.dataclass(eq=False)
class Pipeline:
    """Networks, their parameters and the noise schedule of one Stable Diffusion model.

    `specs`, `params` and `merged` are by component: 'unet', 'vae', 'text_encoder' and perhaps
    'text_encoder_2'. `params` are the base weights and never change; pictures are drawn with
    `merged`, the base plus the scaled adapters.
    """

    checkpoint: Checkpoint
    family: Family
    specs: dict[str, Any]
    params: dict[str, Any]
    tokenizers: tuple[Tokenizer, ...]  # one for each of the family's text encoders
    schedule: Schedule
    size: tuple[int, int]  # (height, width) px that pictures have by default
    merged: dict[str, Any]
    mesh: Mesh | None = None
    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, name, dtype=None, vae_dtype=jnp.float32, *, vae=None, mesh=None, sharding=None):
        """A model (see `checkpoint.open_model`) -> Pipeline.

        dtype: of the UNet and the text encoders; default bfloat16, on CPUs float32. vae: a model or
        a folder whose VAE replaces the model's own, such as TAESD for fast previews.
        mesh: pictures are drawn in equal parts along its axis 'data', the same as without. sharding:
        component -> sharding, or tree of them, of its parameters; default: whole on every device.
        Raises InputError for what is missing, does not fit or is not supported.
        """
        ckpt = open_model(name)
        index = Config(ckpt.index, INDEX_ONLY, ckpt.folder / INDEX)
        family = FAMILIES[index['_class_name']]
        family = family._replace(
            zero_null=index.get('force_zeros_for_empty_prompt', family.zero_null)
        )
        schedule = read_schedule(ckpt.scheduler, ckpt.folder / SCHEDULER)
        dtype = dtype or _default_dtype(mesh)
        sources = dict.fromkeys(('unet', 'vae', *family.text_encoders), ckpt)
        if vae is not None:
            sources['vae'] = open_part(vae, 'vae')
        specs = {part: source.spec(part) for part, source in sources.items()}
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        params = {
            part: source.load(
                part, vae_dtype if part == 'vae' else dtype, (sharding or {}).get(part, whole)
            )
            for part, source in sources.items()
        }
        _check_channels(specs, ckpt.folder)
        factor = specs['vae'].factor
        grid = ckpt.configs['unet'].get('sample_size') or 64
        height, width = grid if isinstance(grid, list) else (grid, grid)
        return cls(
            ckpt,
            family,
            specs,
            params,
            tuple(
                Tokenizer(ckpt.tokenizer(part.replace('text_encoder', 'tokenizer')))
                for part in family.text_encoders
            ),
            schedule,
            (height * factor, width * factor),
            dict(params),
            mesh,
        )

    def net(self, params, z, t, context, **cond):
        """The UNet with these parameters: z [B,h,w,C], t [B], a condition -> [B,h,w,C]."""
        return apply_unet(self.specs['unet'], params, z, t, context, **cond)

    def encode_text(self, prompts, clip_skip=0, truncate=False):
        """[B] str -> their condition: 'context' [B,L,D], and for SDXL 'pooled' [B,P].

        Raises InputError for a prompt over the model's length, unless it may be truncated.
        """
        parts = self.family.text_encoders
        specs = tuple(self.specs[part] for part in parts)
        most = min(spec.layers for spec in specs) - len(specs)
        if not 0 <= clip_skip <= most:
            raise InputError(f'clip_skip = {clip_skip}; this model takes 0 to {most}')
        ids = tuple(tokenizer(prompts, truncate) for tokenizer in self.tokenizers)
        return encode_text(specs, tuple(self.merged[part] for part in parts), ids, clip_skip)

    def latent_shape(self, size=None):
        """(height, width) in px, default the model's own -> (h, w, C) of a latent."""
        (height, width), vae = size or self.size, self.specs['vae']
        if min(height, width) < vae.factor or height % vae.factor or width % vae.factor:
            raise InputError(f'size {height} x {width}: both must be multiples of {vae.factor} px')
        return height // vae.factor, width // vae.factor, vae.latent_channels

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
        lora = jax.tree.map(jnp.asarray, {'unet': lora})
        self.adapters[name] = Adapter(lora, scale, accelerates)
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
        """A Pipeline that shares these weights and draws with this acceleration LoRA alone.

        lora: component -> adapter.
        """
        other = dataclasses.replace(self, adapters={'live': Adapter(lora, 1.0, True)})
        other._remerge()
        return other

    def _remerge(self):
        """merged = params + the sum of scale times update, exact to the parameters' precision."""

        def merge(part, path, w):
            updates = [
                (adapter.lora[part][path], float(adapter.scale))
                for adapter in self.adapters.values()
                if path in adapter.lora.get(part, {})
            ]
            return _add(w, updates) if updates else w

        adapted = {part for adapter in self.adapters.values() for part in adapter.lora}
        self.merged = self.params | {
            part: map_named(functools.partial(merge, part), self.params[part]) for part in adapted
        }

    def __call__(
        self,
        prompt,
        *,
        negative=None,
        image=None,
        mask=None,
        strength=None,
        steps=None,
        sampler=None,
        guidance=None,
        seed=0,
        count=1,
        size=None,
        latents=None,
        timesteps=None,
        spacing=None,
        clip_skip=0,
        truncate=False,
        original_size=None,
        crop=None,
        target_size=None,
    ):
        """Draw `count` pictures of each prompt -> list of PIL images, prompt by prompt.

        prompt: str or list of str. negative: str, used only with guidance above 1. Prompts over the
        model's length are refused, or cut with a warning if `truncate`. clip_skip: layers of the
        text encoder left out for the prompt (diffusers' meaning).

        image: PIL image, or one per prompt, to start from: noised by `strength` (above 0, at most
        1; default 0.8), which leaves out the first steps, or for 'lcm' the times above it.
        mask: PIL image, or one per prompt: only where it is light `image` is drawn anew (strength
        1 by default).

        sampler: a key of samplers.SAMPLERS; steps: how many network steps; spacing: a key of
        samplers.SPACINGS, or timesteps: falling list of ints, in place of the sampler's own.
        guidance has diffusers' meaning (1: none). The default is 'lcm' with 4 steps if an
        acceleration LoRA is loaded (guidance 1) or the UNet is a full LCM, 'ddim' with 50 steps and
        the family's guidance otherwise.

        size: (height, width) px; default the image's, rounded down to what fits, or the model's.
        original_size, crop, target_size: SDXL's micro-conditioning; default size, (0, 0), size.
        latents: noise [N,h,w,C] float32 in place of the seed's.
        Picture i of the list depends on the seed, i and its prompt, not on how many others are
        drawn. Raises InputError for what is out of range and for pictures that are not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        n = len(prompts) * count
        if not prompts or count < 1:
            raise InputError(
                f'nothing to draw: {len(prompts)} prompts, count = {count}; both must be 1 or more'
            )
        if not 0 <= seed < 2**32:
            raise InputError(f'seed = {seed}; a whole number from 0 to {2**32 - 1}')
        sampler, guidance, guided = self._manner(sampler, guidance, negative)
        strength = self._strength(image, mask, strength, timesteps)
        pure = mask is not None and strength == 1 and timesteps is None
        if timesteps is None:
            steps = (4 if sampler == 'lcm' else 50) if steps is None else steps
            times = self.schedule.times(sampler, steps, spacing, strength)
        else:
            times = self.schedule.custom_times(sampler, timesteps, steps)
        size, pictures = self._pictures(image, mask, size, len(prompts), pure)
        shape = (n, *self.latent_shape(size))
        keys = _keys(np.uint32(seed), n)
        if latents is None:
            latents = samplers.fresh(keys)(len(self.schedule.abar), shape)  # as no step has it
        elif np.shape(latents) != shape:
            raise InputError(f'latents of shape {np.shape(latents)}; these pictures need {shape}')
        sizes = self._sizes(size, original_size, crop, target_size)
        rows = {
            'noise': jnp.asarray(latents, jnp.float32),
            'keys': keys,
            'cond': self.encode_text(prompts, clip_skip, truncate) | sizes,
        }
        if guided:
            rows['null'] = self._null(negative, rows['cond'], truncate) | sizes
        rows, pictures = self._place(rows, pictures, n, count)
        drawn, finite = draw(
            self._plan(sampler, steps or len(times) - 1),
            {part: self.merged[part] for part in ('unet', 'vae')},
            self.schedule.abar,
            rows,
            pictures,
            times,
            guidance,
            pure,
        )
        self._check_finite(np.asarray(finite)[:n])
        return images.pictures(drawn[:n])

    def _plan(self, sampler, steps):
        return Plan(
            self.specs['unet'],
            self.specs['vae'],
            self.schedule.prediction_type,
            sampler,
            steps < samplers.SHORT,
            self.mesh,
        )

    def _manner(self, sampler, guidance, negative):
        """Sampler and guidance with their defaults, and whether a null condition takes part."""
        lora = any(a.accelerates and a.scale for a in self.adapters.values())
        embedded = bool(self.specs['unet'].w_dim)
        sampler = sampler or ('lcm' if lora or embedded else 'ddim')
        default = 1 if lora else self.family.guidance
        guidance = float(default if guidance is None else guidance)
        if lora and not embedded and guidance > 2:
            warnings.warn(
                f'guidance {guidance:g} with an acceleration LoRA burns pictures; use 1 to 2',
                stacklevel=3,
            )
        guided = guidance > 1 and not embedded
        if negative and not guided:
            why = (
                'with this model, which takes guidance as an input'
                if embedded
                else f'at guidance {guidance:g}; it acts above 1'
            )
            warnings.warn(f'the negative prompt has no effect {why}', stacklevel=3)
        return sampler, guidance, guided

    def _strength(self, image, mask, strength, timesteps):
        """Strength with its default, after checking that what it acts on is there."""
        needs_mask = self.specs['unet'].in_channels > self.specs['vae'].latent_channels
        if needs_mask and mask is None:
            raise InputError('this UNet is made for inpainting: give an image and a mask')
        if mask is not None and image is None:
            raise InputError('a mask without an image; give both to inpaint')
        if strength is not None and (image is None or timesteps is not None):
            raise InputError(
                f'strength = {strength} '
                + ('without an image' if image is None else 'beside timesteps; leave one out')
            )
        if strength is None:
            strength = 1.0 if image is None or mask is not None or timesteps is not None else 0.8
        return strength

    def _pictures(self, image, mask, size, prompts, pure):
        """-> size (height, width), and what `draw` takes as pictures: [1, ...] or [prompts, ...]."""
        if image is None:
            return size or self.size, {}
        factor = self.specs['vae'].factor
        given = images.as_list(image, prompts, 'image')
        size = size or tuple(x - x % factor for x in given[0].size[::-1])
        self.latent_shape(size)  # an error here is about the size
        picture = np.stack([images.picture(x, size) for x in given])
        if mask is None:
            return size, {'image': picture}
        given = images.as_list(mask, prompts, 'mask')
        mask = np.stack([images.mask(x, size) for x in given])
        out = {'mask': images.shrink(mask, factor)}
        channels = self.specs['unet'].in_channels > self.specs['vae'].latent_channels
        if channels:
            out['masked'] = images.masked(picture, mask)
        if not (channels and pure):
            out['image'] = picture
        return size, out

    def _sizes(self, size, original, crop, target):
        """SDXL's half of a condition, for one picture; {} for other models."""
        if self.specs['unet'].size_dim:
            sizes = micro_conditioning(original or size, crop or (0, 0), target or size)
            return {'sizes': jnp.asarray(sizes[None])}
        if original or crop or target:
            raise InputError('original_size, crop and target_size are for SDXL; this model has none')
        return {}

    def _null(self, negative, cond, truncate):
        """The text half of the null condition, for one picture."""
        if negative is None and self.family.zero_null:
            return {k: jnp.zeros_like(c[:1]) for k, c in cond.items()}
        return self.encode_text([negative or ''], truncate=truncate)  # diffusers: no clip_skip

    def _place(self, rows, pictures, n, count):
        """Conditions and pictures repeated for each picture drawn; all of it on the mesh."""
        parts = 1 if self.mesh is None else self.mesh.shape['data']
        each = np.arange(n + -n % parts) % n  # the mesh's devices draw equal parts
        rows = {
            name: jax.tree.map(lambda x: x[each if len(x) == n else each // count % len(x)], tree)
            for name, tree in rows.items()
        }
        pictures = {k: x if len(x) == 1 else x[each // count] for k, x in pictures.items()}
        if self.mesh is not None:
            split = NamedSharding(self.mesh, PartitionSpec('data'))
            rows = jax.device_put(rows, split)
        return rows, pictures

    def _check_finite(self, finite):
        """finite [N, len(PARTS)]. InputError that names the first part that failed."""
        if finite.all():
            return
        part = PARTS[int(np.argmin(finite.all(0)))]
        name, option = ('vae', 'vae_dtype') if 'VAE' in part else ('unet', 'dtype')
        dtype = jax.tree.leaves(self.params[name])[0].dtype
        advice = (
            'look for broken weights and for LoRA scales or guidance that are too high'
            if dtype == jnp.float32
            else f'load the model with {option}=float32'
        )
        raise InputError(
            f'{(~finite.all(1)).sum()} of {len(finite)} pictures are not finite: the {part} gave '
            f'NaN or infinity in {dtype}; {advice}'
        )


def _default_dtype(mesh):
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jnp.float32 if platform == 'cpu' else jnp.bfloat16


def _check_channels(specs, folder):
    """InputError unless the UNet reads and writes the VAE's latents, alone or with a mask."""
    c, unet = specs['vae'].latent_channels, specs['unet']
    if unet.out_channels != c or unet.in_channels not in (c, 2 * c + 1):
        raise InputError(
            f'{folder}: the UNet has {unet.in_channels} channels in and {unet.out_channels} out; '
            f'with this VAE {c} or {2 * c + 1} (inpainting) in and {c} out are supported'
        )


@jax.jit
def _add(w, updates):
    """Parameter + sum of scale times update, in float32 until the end."""
    total = sum(scale * L.delta(ab).astype(jnp.float32) for ab, scale in updates)
    return (w.astype(jnp.float32) + total).astype(w.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _keys(seed, n):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(n))
