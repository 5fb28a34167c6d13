"""Prompts, and pictures if you like -> pictures: a Stable Diffusion model and what one may ask of it."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm_jax import adapters, images, request, samplers
from lcm_jax.adapters import Adapter
from lcm_jax.checkpoint import Checkpoint
from lcm_jax.conditioning import encode_text, micro_conditioning
from lcm_jax.draw import Plan, check_finite, draw, on_mesh
from lcm_jax.errors import InputError, choose
from lcm_jax.families import Family, takes_mask
from lcm_jax.model import describe
from lcm_jax.scheduler import Schedule
from lcm_jax.text import Tokenizer

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16}


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
    def load(
        cls,
        name,
        dtype=None,
        vae_dtype=jnp.float32,
        *,
        vae=None,
        prediction_type=None,
        mesh=None,
        sharding=None,
    ):
        """A model and, if need be, its prediction type (see `checkpoint.open_model`) -> Pipeline.

        dtype: of the UNet and the text encoders, a key of DTYPES or such a type; default bfloat16, on
        CPUs float32. vae: a model or a folder whose VAE replaces the model's own, such as TAESD for
        fast previews.
        mesh: pictures are drawn in equal parts along its axis 'data', the same as without. sharding:
        component -> sharding, or tree of them, of its parameters; default: whole on every device.
        Raises InputError for what is missing, does not fit or is not supported.
        """
        model = describe(name, prediction_type, vae)
        default = jnp.float32 if _platform(mesh) == 'cpu' else jnp.bfloat16
        dtypes = dict.fromkeys(model.specs, _dtype('dtype', dtype or default))
        dtypes['vae'] = _dtype('vae_dtype', vae_dtype)
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        homes = {part: (sharding or {}).get(part, whole) for part in model.specs}
        params = model.load(model.specs, dtypes, homes)
        return cls(
            model.checkpoint,
            model.family,
            model.specs,
            params,
            model.tokenizers,
            model.schedule,
            model.size,
            params,
            mesh,
        )

    def encode_text(self, prompts, clip_skip=0, truncate=False):
        """[B] str -> their condition: 'context' [B,L,D], and for SDXL 'pooled' [B,P].

        Raises InputError for a prompt over the model's length, unless it may be truncated.
        """
        parts = self.family.text_encoders
        specs = tuple(self.specs[part] for part in parts)
        most = min(spec.layers for spec in specs) - len(specs)
        clip_skip = request.whole('clip_skip', clip_skip, 0, most)
        ids = tuple(tokenizer(prompts, truncate) for tokenizer in self.tokenizers)
        return encode_text(specs, tuple(self.merged[part] for part in parts), ids, clip_skip)

    def encode_null(self, negative=None, truncate=False):
        """Negative prompt -> the null condition of guidance, [1, ...] each, as `encode_text`.

        Without one: the empty prompt's, or zeros where the model was trained so (SDXL). diffusers'
        `clip_skip` does not act here.
        """
        cond = self.encode_text([negative or ''], truncate=truncate)
        zero = negative is None and self.family.zero_null
        return jax.tree.map(jnp.zeros_like, cond) if zero else cond

    def sizes(self, size, original=None, crop=None, target=None):
        """SDXL's micro-conditioning of one picture, {'sizes': [1,6]}; {} for other models.

        All in px, heights first; `original` and `target` are `size` if not given, `crop` (0, 0).
        """
        if self.specs['unet'].size_dim:
            sizes = micro_conditioning(original or size, crop or (0, 0), target or size)
            return {'sizes': jnp.asarray(sizes[None])}
        if original or crop or target:
            raise InputError('original_size, crop and target_size are told to SDXL models only')
        return {}

    def latent_shape(self, size=None):
        """(height, width) in px, default the model's own -> (h, w, C) of a latent."""
        (height, width), vae = size or self.size, self.specs['vae']
        if min(height, width) < vae.factor or height % vae.factor or width % vae.factor:
            raise InputError(f'size {height} x {width}: both must be multiples of {vae.factor} px')
        return height // vae.factor, width // vae.factor, vae.latent_channels

    def add_lora(self, file, name=None, scale=1.0):
        """Add a LoRA under `name`, default its stem, at `scale`.

        file: .safetensors, a folder or hub id with one, 'lcm' or 'fluent' (shipped). It counts as an
        acceleration LoRA, which changes the defaults of drawing, if its metadata says so or a name
        of it contains 'lcm', see `accelerates`. Raises InputError unless all of it fits the model.
        """
        name = name or Path(file).stem
        if name in self.adapters:
            raise InputError(
                f'a LoRA named {name!r} is loaded already; give it another name than '
                f'{", ".join(self.adapters)}'
            )
        self.adapters[name] = adapters.read_adapter(file, name, scale, self.params)
        self._remerge()

    def set_scale(self, name, scale):
        """Change the scale of a loaded LoRA; nothing is compiled anew."""
        self.adapters[name] = adapters.scaled(choose('LoRA', name, self.adapters), scale)
        self._remerge()

    def remove_lora(self, name):
        """Take a loaded LoRA away."""
        choose('LoRA', name, self.adapters)
        del self.adapters[name]
        self._remerge()

    def set_loras(self, terms):
        """Draw with these alone: [(file, scale)], as `add_lora` takes them, each named by its file.

        Raises InputError, and changes nothing, unless all of them fit, each given once.
        """
        added = {}
        for file, scale in terms:
            if str(file) in added:
                raise InputError(f'LoRA {str(file)!r} is given twice; give the sum of its scales')
            added[str(file)] = adapters.read_adapter(file, Path(file).stem, scale, self.params)
        self.adapters.clear()
        self.adapters.update(added)
        self._remerge()

    def _remerge(self):
        self.merged = self.params  # lets go of the old sums before there are new ones
        self.merged = adapters.merge(self.params, self.adapters.values())

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
        first=0,
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
        1; default 0.8), which leaves out the first steps, also of `timesteps`; those that 'lcm'
        chooses itself are as many, below it.
        mask: PIL image, or one per prompt: only where it is light `image` is drawn anew (strength
        1 by default). What is transparent is white in an image, black in a mask.

        sampler: a key of samplers.SAMPLERS; steps: how many network steps; spacing: a key of
        samplers.SPACINGS, or timesteps: falling list of ints, in place of the sampler's own.
        guidance has diffusers' meaning (1: none). The default is 'lcm' with 4 steps and guidance 1
        if an acceleration LoRA is loaded or the model is an LCM (one that takes guidance as an
        input: 8.5, or the middle of what it learnt), 'ddim' with 50 steps and the family's guidance
        otherwise.

        size: (height, width) px; default the image's, rounded down to what fits, or the model's.
        original_size, crop, target_size: SDXL's micro-conditioning; default size, (0, 0), size.
        latents: noise [N,h,w,C] float32 in place of the seed's.
        first: number of the first picture. Picture i of the list depends on the seed, first + i and
        its prompt, not on how many others are drawn: a long list can be drawn in parts. Raises
        InputError for what is out of range and for pictures that are not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError('nothing to draw: give a prompt, or a list of them')
        count = request.whole('count', count, 1)
        n = len(prompts) * count
        unet, vae = self.specs['unet'], self.specs['vae']
        fast = any(a.accelerates and a.scale for a in self.adapters.values())
        sampler, guidance, guided = self.manner(sampler, guidance, negative, fast)
        strength, pure = request.start(image, mask, strength, takes_mask(unet, vae))
        steps, times = self._times(sampler, steps, timesteps, spacing, strength)
        image = images.as_list(image, len(prompts), 'image')
        mask = images.as_list(mask, len(prompts), 'mask', 'black')  # what is transparent is kept
        size, original_size, crop, target_size = map(
            request.sides,
            ('size', 'original_size', 'crop', 'target_size'),
            (size, original_size, crop, target_size),
        )
        size = size or (request.picture_size(image, vae.factor) if image else self.size)
        rows = self._noise(seed, first, (n, *self.latent_shape(size)), latents)
        sizes = self.sizes(size, original_size, crop, target_size)
        told = {'cond': self.encode_text(prompts, clip_skip, truncate) | sizes}
        if guided:
            told['null'] = self.encode_null(negative, truncate) | sizes
        rows |= jax.tree.map(lambda x: jnp.repeat(x, n // len(x), 0), told)
        pictures = {
            name: x if len(x) == 1 else np.repeat(x, count, 0)
            for name, x in request.pictures(image, mask, size, unet, vae, pure).items()
        }
        kind, low_end = self.schedule.prediction_type, samplers.low_end(steps, times)
        drawn, finite = draw(
            Plan(unet, vae, kind, sampler, low_end, _platform(self.mesh), self.mesh),
            {part: self.merged[part] for part in ('unet', 'vae')},
            self.schedule.abar,
            *on_mesh(self.mesh, rows, pictures),
            times,
            guidance,
            pure,
        )
        check_finite(np.asarray(finite)[:n], self.params)
        return images.pictures(np.asarray(drawn)[:n])

    def manner(self, sampler, guidance, negative, fast):
        """`request.manner` of this model; fast: whether an acceleration LoRA takes part."""
        family, embedded = self.family, bool(self.specs['unet'].w_dim)
        return request.manner(
            sampler,
            guidance,
            negative,
            fast=fast or self.schedule.few_steps,
            embedded=embedded,
            default=family.embedded if embedded else family.guidance,
            told=family.told,
        )

    def _times(self, sampler, steps, timesteps, spacing, strength):
        """-> number of steps without regard to strength, times [m+1]."""
        if timesteps is None:
            steps = samplers.SAMPLERS[sampler].steps if steps is None else steps
            return steps, self.schedule.times(sampler, steps, spacing, strength)
        if spacing is not None:
            raise InputError(f'spacing {spacing!r} beside timesteps; leave one of them out')
        times = self.schedule.custom_times(sampler, timesteps, steps, strength)
        return len(timesteps), times

    def _noise(self, seed, first, shape, latents):
        """-> {'keys' [N], 'noise' [N,h,w,C]}: each picture's own, whatever the batch."""
        seed, first = (
            np.uint32(request.whole(name, x)) for name, x in (('seed', seed), ('first', first))
        )
        keys = _keys(seed, first, shape[0])
        if latents is None:
            latents = samplers.fresh(keys)(len(self.schedule.abar), shape)  # a number no step has
        elif np.shape(latents) != shape:
            raise InputError(f'latents of shape {np.shape(latents)}; these pictures need {shape}')
        return {'keys': keys, 'noise': jnp.asarray(latents, jnp.float32)}


def _dtype(key, value):
    """A key of DTYPES, or a type -> dtype. InputError for any other, which pictures cannot be drawn in."""
    with contextlib.suppress(TypeError):  # of what is no dtype at all
        value = jnp.dtype(value).name
    return choose(key, value, DTYPES)


def _platform(mesh):
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


@functools.partial(jax.jit, static_argnums=2)
def _keys(seed, first, n):
    numbers = first + jnp.arange(n, dtype=jnp.uint32)
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
