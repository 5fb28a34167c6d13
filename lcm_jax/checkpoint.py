"""A model on disk, opened: its configs, weights, noise schedule and tokenizers, whatever its form."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from lcm_jax import weights
from lcm_jax.data import EMOJI
from lcm_jax.errors import InputError, nearest
from lcm_jax.models import configs, shapes

MODELS = {'emoji': EMOJI / 'pipeline'}  # shipped
# Component folder -> (weights file, config -> spec, spec -> abstract parameters).
COMPONENTS = {
    'unet': ('diffusion_pytorch_model.safetensors', configs.unet_spec, shapes.unet_shapes),
    'vae': ('diffusion_pytorch_model.safetensors', configs.vae_spec, shapes.vae_shapes),
    'text_encoder': ('model.safetensors', configs.text_spec, shapes.text_shapes),
    'text_encoder_2': ('model.safetensors', configs.text_spec, shapes.text_shapes),
    'image_encoder': ('model.safetensors', configs.vision_spec, shapes.vision_shapes),
}
INDEX = 'model_index.json'
SCHEDULER = Path('scheduler', 'scheduler_config.json')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened model. Configs are diffusers' and transformers' own, as dicts."""

    folder: Path
    index: dict  # model_index.json
    configs: dict[str, dict]  # component -> config.json
    scheduler: dict  # scheduler_config.json

    def spec(self, part):
        """Component -> its spec. InputError for a component that is not there or not supported."""
        if part not in self.configs:
            raise InputError(f'{self.folder} has no {part}, but {", ".join(self.configs)}')
        return COMPONENTS[part][1](self.configs[part], self.folder / part / 'config.json')

    def shapes(self, part, dtype=jnp.float32):
        """Component -> its parameters as shapes of `dtype`."""
        return COMPONENTS[part][2](self.spec(part), dtype)

    def file(self, part):
        """Component -> its weights file."""
        return self.folder / part / COMPONENTS[part][0]

    def load(self, part, dtype=jnp.float32):
        """Component -> its parameters on the device, in `dtype`.

        Raises InputError naming the file that is missing, unreadable or does not fit its config.
        """
        tensors, _ = weights.read_tensors(self.file(part))
        params = weights.load(self.shapes(part, dtype), tensors, self.file(part))
        return jax.tree.map(jnp.asarray, params)

    def tokenizer(self, name='tokenizer'):
        """The folder of a tokenizer."""
        return self.folder / name


def open_model(name):
    """A shipped model's name or a diffusers folder -> Checkpoint. Reads configs only.

    Raises InputError if it is neither, or a config cannot be read.
    """
    folder = Path(MODELS.get(str(name), name))
    if not (folder / INDEX).is_file():
        raise InputError(
            f'{str(name)!r} is neither a shipped model ({", ".join(MODELS)})'
            f'{nearest(name, MODELS)} nor a diffusers folder: no {INDEX}'
        )
    return open_folder(folder)


def open_folder(folder):
    """A folder of components, with model_index.json or without -> Checkpoint."""
    folder = Path(folder)

    def read(file):
        return weights.read_json(folder / file) if (folder / file).is_file() else {}

    parts = {part: read(Path(part, 'config.json')) for part in COMPONENTS}
    return Checkpoint(folder, read(INDEX), {k: v for k, v in parts.items() if v}, read(SCHEDULER))
