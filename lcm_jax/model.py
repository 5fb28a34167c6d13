"""A Stable Diffusion model without its weights in memory: what drawing, training and planning share."""

import dataclasses
import functools
from typing import Any

from lcm_jax import infer
from lcm_jax.checkpoint import INDEX, SCHEDULER, Checkpoint, open_model, open_part
from lcm_jax.families import Family, check_channels, read_family
from lcm_jax.scheduler import Schedule, read_schedule


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes and noise schedule of a model, and where its weights are."""

    family: Family
    specs: dict[str, Any]  # of 'unet', 'vae', and the family's text encoders
    schedule: Schedule
    size: tuple[int, int]  # (height, width) px that pictures have by default
    sources: dict[str, Checkpoint] = dataclasses.field(default_factory=dict)  # by component

    @property
    def encoders(self):
        """The specs of 'vae' and the text encoders."""
        return {part: self.specs[part] for part in ('vae', *self.family.text_encoders)}

    @property
    def checkpoint(self):
        """The model on disk."""
        return self.sources['unet']

    def load(self, parts, dtypes, sharding=None):
        """Names of components -> {component: parameters}, each placed straight on its devices.

        dtypes: by component. sharding: as `Checkpoint.load` takes it, for all or by component.
        Raises InputError for what does not fit its config, or the VAE the UNet.
        """
        homes = sharding if isinstance(sharding, dict) else dict.fromkeys(parts, sharding)
        found = {part: self.sources[part].load(part, dtypes[part], homes[part]) for part in parts}
        check_channels(self.specs['unet'], self.specs['vae'], self.checkpoint.folder)
        return found

    def marks(self, parts):
        """Names of components -> {component: what its weights are known by}, see `Checkpoint.mark`."""
        return {part: self.sources[part].mark(part) for part in parts}

    @functools.cached_property
    def tokenizers(self):
        """A Tokenizer for each text encoder."""
        names = (part.replace('text_encoder', 'tokenizer') for part in self.family.text_encoders)
        return tuple(self.checkpoint.tokenizer(name) for name in names)


def describe(name, prediction_type=None, vae=None):
    """A model in any form that `open_model` opens -> Model; reads configs and headers only.

    vae: a model, folder or file whose VAE replaces the model's own; if it does not say its scaling
    factor, as files of a VAE alone do not, it has the model's.
    Raises InputError for what is missing, does not fit together or is not supported.
    """
    ckpt = open_model(name, prediction_type)
    family = read_family(ckpt.index, ckpt.folder / INDEX)
    schedule = read_schedule(ckpt.scheduler, ckpt.folder / SCHEDULER)
    sources = dict.fromkeys(('unet', 'vae', *family.text_encoders), ckpt)
    if vae is not None:
        sources['vae'] = open_part(vae, 'vae')
    specs = {part: source.spec(part) for part, source in sources.items()}
    if 'scaling_factor' not in sources['vae'].configs['vae']:
        usual = infer.SCALING[bool(specs['unet'].size_dim)]
        own = ckpt.configs.get('vae', {}).get('scaling_factor', usual)
        specs['vae'] = dataclasses.replace(specs['vae'], scaling_factor=own)
    grid = ckpt.configs['unet'].get('sample_size') or 64
    height, width = grid if isinstance(grid, list) else (grid, grid)
    factor = specs['vae'].factor
    return Model(family, specs, schedule, (height * factor, width * factor), sources)
