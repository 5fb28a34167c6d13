"""The networks that metrics see with, opened from local files, each with its way to prepare pictures."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn

from lcm_jax import weights
from lcm_jax.checkpoint import component_shapes, open_component, open_file, open_model
from lcm_jax.errors import InputError, choose
from lcm_jax.models import lpips, shapes
from lcm_jax.models.clip import ImageEncoder, TextEncoder
from lcm_jax.models.configs import clip_specs
from lcm_jax.models.inception import CLASSES, WIDTH, Inception
from lcm_jax.resize import INCEPTION, PLAIN, Pixels, clip_pixels, emoji_pixels
from lcm_jax.tensors import read_json
from lcm_jax.text import Tokenizer
from lcm_jax.tree import digest

HEADS = Path(__file__).parent / 'lpips_heads'  # shipped


class Network(NamedTuple):
    """A module, its parameters, and how pictures come to it (None: it takes token ids)."""

    module: nn.Module
    params: dict
    pixels: Pixels | None = None


class Backbone(NamedTuple):
    """What a name stands for."""

    identity: str  # network, resizing and a hash of the weights: all that its numbers depend on
    image: Network
    text: Network | None = None
    tokenizer: Tokenizer | None = None
    least: int = 1  # px that a side of a picture must have


class Family(NamedTuple):
    """How a name is written, how many files follow it, and fn(*files) -> Backbone."""

    usage: str
    files: tuple[int, ...]
    open: Callable


def open_backbone(kind, name, table):
    """'NAME' or 'NAME:FILE[:FILE]' of a table, called `kind` in errors -> Backbone in numpy.

    Raises InputError for an unknown name, and for files that are missing or do not fit.
    """
    family, colon, rest = str(name).partition(':')
    row = choose(kind, family, table)
    files = rest.split(':') if colon else []
    if len(files) not in row.files or '' in files:
        raise InputError(f'{kind} {str(name)!r}: write it as {row.usage}')
    return row.open(*map(Path, files))


def _emoji_tower(model):
    spec = model.spec('image_encoder')
    return Network(ImageEncoder(spec), _part(model, 'image_encoder'), emoji_pixels(spec.size))


def _part(model, part):
    return weights.load(model.shapes(part), model.open(part), model.folder / part)


def _emoji():
    model = open_model('emoji')
    image = _emoji_tower(model)
    text = Network(TextEncoder(model.spec('text_encoder')), _part(model, 'text_encoder'))
    key = digest({'image': image.params, 'text': text.params})
    return Backbone(f'emoji-{image.pixels.name}-{key}', image, text, model.tokenizer())


def _clip(folder):
    file = folder / 'config.json'
    text, image = clip_specs(read_json(file), file)
    pixels, colours = clip_pixels(folder, image.size)
    tokenizer = Tokenizer(folder)
    if tokenizer.length > text.length:
        raise InputError(
            f'{folder}: the tokenizer pads to {tokenizer.length} tokens; the text tower takes at '
            f'most {text.length}'
        )
    trees = {
        part: component_shapes(part, spec, file)
        for part, spec in (('text_encoder', text), ('image_encoder', image))
    }
    wanted = {part: weights.keys(tree) for part, tree in trees.items()}
    whole = wanted['text_encoder'] | wanted['image_encoder'] | {'logit_scale': ()}  # of training
    found = weights.cover(whole, open_component(folder, 'model.safetensors'), folder)
    params = {
        part: weights.load(tree, {k: found[k] for k in wanted[part]}, folder)
        for part, tree in trees.items()
    }
    key = digest(params, text.heads, text.act, image.heads, image.act, colours)
    return Backbone(
        f'clip-{pixels.name}-{key}',
        Network(ImageEncoder(image), params['image_encoder'], pixels),
        Network(TextEncoder(text), params['text_encoder']),
        tokenizer,
    )


def _loaded(file, tree, *args, unused='', also=()):
    """A file that holds the tree of shapes tree(*args) -> its parameters, in numpy.

    unused: regex of keys that may be there too; also: {key: shape} that must be there too.
    """
    found = {k: x for k, x in open_file(file)[0].items() if not re.fullmatch(unused, k)}
    tree = tree(*args)  # seconds: after the file is found
    wanted = weights.keys(tree)
    found = weights.cover(wanted | dict(also), found, file)
    return weights.load(tree, {k: found[k] for k in wanted}, file)


def _inception(mode, file):
    # The classifier tells the file from torchvision's, which has 1000 classes.
    head = {'fc.weight': (CLASSES, WIDTH), 'fc.bias': (CLASSES,)}
    batches = r'.*\.bn\.num_batches_tracked'
    params = _loaded(file, shapes.inception_shapes, unused=batches, also=head)
    image = Network(Inception(), params, INCEPTION[mode])
    return Backbone(f'inception-{mode}-{digest(params)}', image)


def _lpips(kind, trunk_file, heads_file=None):
    spec = lpips.TRUNKS[kind]
    heads_file = heads_file or HEADS / f'{kind}.safetensors'
    classifier = r'classifier\.\d+\.(weight|bias)'
    params = {
        'trunk': _loaded(trunk_file, shapes.trunk_shapes, spec, unused=classifier),
        'heads': _loaded(heads_file, shapes.head_shapes, spec),
    }
    image = Network(lpips.Trunk(spec), params, PLAIN)
    return Backbone(f'lpips-{kind}-{digest(params)}', image, least=spec.least)


def _emoji_lpips():
    image = _emoji_tower(open_model('emoji'))
    identity = f'lpips-emoji-{image.pixels.name}-{digest(image.params)}'
    return Backbone(identity, image._replace(params={'trunk': image.params}))


FEATURES = {
    'emoji': Family('emoji', (0,), _emoji),
    'clip': Family('clip:FOLDER', (1,), _clip),
} | {
    name: Family(f'{name}:FILE', (1,), partial(_inception, mode))
    for name, mode in (
        ('inception', 'pytorch-fid'),
        ('inception-tf', 'torch-fidelity'),
        ('inception-clean', 'clean-fid'),
    )
}
LPIPS = {'emoji': Family('emoji', (0,), _emoji_lpips)} | {
    kind: Family(f'{kind}:BACKBONE_FILE[:HEADS_FILE]', (1, 2), partial(_lpips, kind))
    for kind in lpips.TRUNKS
}
