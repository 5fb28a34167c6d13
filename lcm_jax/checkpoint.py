"""A model on disk, opened: its configs, weights, noise schedule and tokenizers, whatever its form."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from lcm_jax import hub, single, tensors, weights
from lcm_jax.data.emoji import EMOJI
from lcm_jax.diffusion import KINDS
from lcm_jax.errors import InputError, choose, first_line, nearest
from lcm_jax.models import configs, shapes
from lcm_jax.text import Tokenizer
from lcm_jax.tree import digest

MODELS = {'emoji': EMOJI / 'pipeline'}  # shipped
# Component folder -> (weights file, config -> spec, spec -> abstract parameters).
COMPONENTS = {
    'unet': ('diffusion_pytorch_model.safetensors', configs.unet_spec, shapes.unet_shapes),
    'vae': ('diffusion_pytorch_model.safetensors', configs.vae_spec, shapes.vae_shapes),
    'text_encoder': ('model.safetensors', configs.text_spec, shapes.text_shapes),
    'text_encoder_2': ('model.safetensors', configs.text_spec, shapes.text_shapes),
    'image_encoder': ('model.safetensors', configs.vision_spec, shapes.vision_shapes),
}
PARAMS = 'params'  # in an orbax checkpoint's component folder, in place of the weights file
INDEX = 'model_index.json'
SCHEDULER = Path('scheduler', 'scheduler_config.json')
MARKED = 16  # tensors that a component's mark is made of


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened model. Configs are diffusers' and transformers' own, as dicts."""

    folder: Path  # or single file
    index: dict  # model_index.json
    configs: dict[str, dict]  # component -> config.json
    scheduler: dict  # scheduler_config.json
    open: Callable  # component -> its {checkpoint key: Tensor} as they are on disk
    tokenizer: Callable  # name, default 'tokenizer' -> Tokenizer

    def spec(self, part):
        """Component -> its spec. InputError for a component that is not there or not supported."""
        if part not in self.configs:
            raise InputError(f'{self.folder} has no {part}, but {", ".join(self.configs)}')
        return COMPONENTS[part][1](self.configs[part], self.folder / part / 'config.json')

    def shapes(self, part, dtype=jnp.float32):
        """Component -> its parameters as shapes of `dtype`. InputError for sizes that cannot be."""
        tree = component_shapes(part, self.spec(part), self.folder)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)

    def tensors(self, part):
        """Component -> {diffusers key: Tensor}, complete and of the right shapes; none is read.

        Raises InputError naming the file that is missing, unreadable or does not fit its config.
        """
        want = weights.keys(self.shapes(part))
        return weights.cover(want, self.open(part), self.folder / part)

    def mark(self, part):
        """Component -> 12 hexadecimal digits by which its weights are known: a hash of some matrices.

        It reads MARKED tensors at most, spread over the component, so a full training shows, and so does a
        LoRA merged into all of its attention; a change of other tensors alone does not.
        """
        found = self.tensors(part)
        names = sorted(name for name, x in found.items() if x.ndim > 1)
        return digest({name: found[name] for name in names[:: -(-len(names) // MARKED)]})

    def load(self, part, dtype=jnp.float32, sharding=None):
        """Component -> its parameters in `dtype`, each placed straight on its devices.

        sharding: None (the default device), a Sharding, or a tree of them. Raises InputError as
        `tensors` does, and for a tensor that is not finite.
        """
        tree = weights.bind(self.shapes(part), self.open(part), self.folder / part)
        return weights.place(jax.tree.map(lambda x: x.astype(dtype), tree), sharding)


def component_shapes(part, spec, source):
    """A component's spec -> its parameters as shapes. InputError that names `source` if it cannot be."""
    try:
        return _shapes(part, spec)
    except Exception as e:  # flax and jax raise many types for sizes that do not fit together
        raise InputError(f'{source}: no {part} has these sizes: {spec}: {first_line(e)}') from e


@functools.cache
def _shapes(part, spec):
    """What a component holds; seconds to trace for the largest."""
    return COMPONENTS[part][2](spec)


def open_model(name, prediction_type=None):
    """A shipped model, diffusers or orbax folder, single file or hub id -> Checkpoint.

    Single files are .safetensors with original names, or pickles (.ckpt, where torch is installed).
    Hub ids are OWNER/NAME or OWNER/NAME@REVISION, from the cache when offline (HF_HUB_OFFLINE=1).
    prediction_type replaces what the model says. Reads configs and headers only. Raises InputError
    if it is none of these, or a config cannot be read.
    """
    path = Path(MODELS.get(str(name), name))
    if path.is_file():
        return open_single(path, prediction_type)
    if not path.exists() and hub.ID.fullmatch(str(name)):
        path = hub.download(str(name), functools.partial(needed, source=name))
    found = open_folder(path)
    if not found.configs:
        raise InputError(
            f'{str(name)!r} is neither a shipped model ({", ".join(MODELS)})'
            f'{nearest(name, MODELS)}, nor a file, nor a diffusers folder: no {INDEX}'
        )
    if prediction_type:
        choose('prediction_type', prediction_type, KINDS)
        found.scheduler['prediction_type'] = prediction_type
    return found


def open_folder(folder):
    """A folder of components, with model_index.json or without -> Checkpoint."""
    folder = Path(folder)

    def read(file):
        config = tensors.read_json(folder / file) if (folder / file).is_file() else {}
        if not isinstance(config, dict):
            kind = type(config).__name__
            raise InputError(f'{folder / file} holds a {kind}, not an object of keys')
        return config

    parts = {part: read(Path(part, 'config.json')) for part in COMPONENTS}
    return Checkpoint(
        folder,
        read(INDEX),
        {k: v for k, v in parts.items() if v},
        read(SCHEDULER),
        lambda part: open_component(folder / part, COMPONENTS[part][0]),
        lambda name='tokenizer': Tokenizer(folder / name),
    )


def open_single(file, prediction_type=None):
    """A whole model in one file with original names -> Checkpoint; see `single.describe`."""
    found, metadata = open_file(file)
    found = single.unified(found, file)
    layout, parts, model = single.describe(found, metadata, file, prediction_type)

    @functools.cache
    def opened():
        shapes = {part: weights.keys(new.shapes(part)) for part in parts}
        return single.open_parts(found, layout, parts, shapes, file)

    def tokenizer(name='tokenizer'):
        texts = {k: x for k, x in model['texts'].items() if Path(k).parent.name == name}
        return Tokenizer.from_texts(texts) if texts else Tokenizer.clip(single.pad(layout, name))

    new = Checkpoint(
        file,
        model['index'],
        model['configs'],
        model['scheduler'],
        lambda part: opened()[part],
        tokenizer,
    )
    return new


def needed(names, source='repository'):
    """All file names of a repository, called `source` in errors -> those that a model needs."""
    yield from (INDEX, str(SCHEDULER))
    for part in COMPONENTS:
        inside = {n.partition('/')[2] for n in names if n.startswith(part + '/')}
        if file := weights_file(inside, f'{source}/{part}'):
            yield f'{part}/config.json'
            yield f'{part}/{file}'
        if file and file.endswith('.json'):  # an index: all its shards
            yield from (f'{part}/{name}' for name in sorted(inside) if shard_of(file, name))
    yield from (name for name in names if name.startswith('tokenizer'))


def open_part(name, part):
    """A model, or the folder of one component alone -> Checkpoint that has this component."""
    folder = Path(name)
    if (folder / INDEX).is_file() or not (folder / 'config.json').is_file():
        return open_model(name)
    config = tensors.read_json(folder / 'config.json')
    default = COMPONENTS[part][0]
    return Checkpoint(
        folder, {}, {part: config}, {}, lambda _: open_component(folder, default), None
    )


# --- which file of a component's folder holds its weights

STEMS = ('diffusion_pytorch_model', 'model', 'pytorch_model')  # diffusers, transformers (two)
ENDS = ('safetensors', 'bin')


def weights_file(names, source='folder'):
    """File names of a component's folder -> the one to open: weights, or the index of their shards.

    safetensors before pickles, the plain file before variants such as fp16, one file before shards.
    None if there is none. Raises InputError, naming `source`, where the only choice is between variants.
    """
    for end in ENDS:
        for stem in STEMS:
            for plain in (f'{stem}.{end}', f'{stem}.{end}.index.json'):
                if plain in names:
                    return plain
            for variant in (rf'{stem}\.(\w+)\.{end}', rf'{stem}\.{end}\.index\.(\w+)\.json'):
                found = sorted(name for name in names if re.fullmatch(variant, name))
                if len(found) > 1:
                    raise InputError(
                        f'{source}: choose one of {", ".join(found)} and name it {stem}.{end}'
                    )
                if found:
                    return found[0]
    return None


def shard_of(index, name):
    """Whether a file is, by its name, a shard of what this index is of: of the same variant.

    A variant's shards have its name before their numbers or, of older programs, after them.
    """
    stem, end, variant = re.fullmatch(r'(\w+)\.(\w+)\.index(\.\w+)?\.json', index).groups('')
    number, variant = r'-\d+-of-\d+', re.escape(variant)
    return re.fullmatch(rf'{stem}({variant}{number}|{number}{variant})\.{end}', name)


def open_component(folder, default):
    """A component's folder -> {checkpoint key: Tensor}. Raises InputError naming the file.

    default: the name of the file that is missing, where there is none.
    """
    if (folder / PARAMS).is_dir():
        from lcm_jax import orbax_io  # a second to import

        return weights.unbind(orbax_io.open_tree(folder / PARAMS))
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    name = weights_file(names, folder)
    if name is None:
        raise InputError(f'no such file: {folder / default}')
    if name.endswith('.json'):
        return open_shards(folder / name)
    return open_file(folder / name)[0]


def open_file(file):
    """A file of weights, safetensors or pickle -> ({key: Tensor}, metadata)."""
    if file.suffix == '.safetensors':
        return tensors.open_tensors(file)
    return tensors.open_pickle(file), {}


def open_shards(index):
    """The index of a sharded file -> {checkpoint key: Tensor} of all shards."""
    where = tensors.read_json(index)
    where = where.get('weight_map') if isinstance(where, dict) else None
    if not isinstance(where, dict) or not all(isinstance(x, str) for x in where.values()):
        raise InputError(f'{index} has no weight_map of keys to files')
    found = {}
    for file in sorted(set(where.values())):
        found |= open_file(index.parent / Path(file).name)[0]
    absent = sorted(where.keys() - found.keys())
    if absent:
        raise InputError(
            f'{index} names {len(absent)} tensors that its shards do not hold: '
            f'{", ".join(absent[:3])}{nearest(absent[0], found)}'
        )
    return found
