"""Pictures and captions -> the features and distances of metrics: CLIP, FID's Inception-v3, LPIPS.

All weights are read from local files. Networks run in float32 at full precision on every platform,
so that numbers can be compared with those of the reference implementations.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lcm_jax import sharding, weights
from lcm_jax.backbones import FEATURES, LPIPS, Backbone, open_backbone
from lcm_jax.encode import batched
from lcm_jax.errors import InputError
from lcm_jax.models import lpips


@dataclasses.dataclass(frozen=True)
class Features:
    """Networks that turn pictures, and perhaps captions, into rows of numbers."""

    backbone: Backbone
    run: Callable  # see _opened

    @property
    def identity(self):
        """A short name of network, resizing and weights, to be stored beside numbers."""
        return self.backbone.identity

    @property
    def reads_text(self):
        """Whether there are features of captions."""
        return self.backbone.text is not None

    def images(self, pictures):
        """[N,H,W,3] uint8, or a list of such pictures, PIL's too -> [N,D] float32.

        Raises InputError for other shapes and types, and for pictures of several sizes.
        """
        return self.run(self.backbone.image, _embedded, checked(pictures))

    def texts(self, captions, truncate=False):
        """[N] str -> [N,D] float32.

        Raises InputError where there is no text tower, and for a caption that is too long, unless it
        may be truncated, with a warning.
        """
        if not self.reads_text:
            raise InputError(f'{self.identity} reads no text; emoji and clip:FOLDER do')
        captions = [*captions]
        if not captions:
            raise InputError('no captions; give one or more')
        return self.run(self.backbone.text, _pooled, self.backbone.tokenizer(captions, truncate))


@dataclasses.dataclass(frozen=True)
class Distance:
    """A perceptual distance between pictures (LPIPS, arXiv 1801.03924)."""

    backbone: Backbone
    run: Callable

    @property
    def identity(self):
        """As in Features."""
        return self.backbone.identity

    def distance(self, a, b):
        """Pictures a and b, [N,H,W,3] uint8 each -> the distances of their rows, [N] float32.

        Raises InputError for other shapes and types, and for pictures that are too small.
        """
        a, b = checked(a), checked(b)
        if a.shape != b.shape:
            raise InputError(f'pictures {[*a.shape]} and {[*b.shape]}; give as many, of one size')
        (height, width), least = a.shape[1:3], self.backbone.least
        if min(height, width) < least:
            raise InputError(
                f'pictures of {height} x {width} px; {self.identity} needs {least} px a side'
            )
        return self.run(self.backbone.image, _apart, a, b)


def open_features(name, *, mesh=None, batch=64):
    """A name of `backbones.FEATURES`, with its file -> Features.

    emoji: the shipped CLIP towers.
    clip:FOLDER: any transformers `CLIPModel`, with its tokenizer and preprocessor_config.json.
    inception:FILE, inception-tf:FILE, inception-clean:FILE: FID's network from
    `pt_inception-2015-12-05-6726825d.pth`, or the same as .safetensors, with pictures resized as
    pytorch-fid, torch-fidelity (as TensorFlow 1) and clean-fid do.

    batch: rows at a time, rounded up to a multiple of the mesh's axis 'data', which divides them.
    Raises InputError for an unknown name, and for a file that is missing or does not fit.
    """
    return Features(*_opened('features', name, FEATURES, mesh, batch))


def open_lpips(name, *, mesh=None, batch=16):
    """A name of `backbones.LPIPS`, with its files -> Distance.

    alex, vgg or squeeze:BACKBONE_FILE[:HEADS_FILE]: torchvision's AlexNet, VGG-16 or SqueezeNet 1.1,
    with the heads of LPIPS 0.1, shipped, or others.
    emoji: all layers of the shipped image tower, without heads; small, and on no published scale.

    mesh, batch, errors: as in `open_features`.
    """
    return Distance(*_opened('lpips', name, LPIPS, mesh, batch))


def checked(pictures):
    """Pictures -> [N,H,W,3] uint8, or InputError."""
    if not isinstance(pictures, np.ndarray):
        pictures = [np.asarray(p) for p in pictures]
        for i, picture in enumerate(pictures):
            if picture.shape != pictures[0].shape:
                raise InputError(
                    f'picture {i} is {[*picture.shape]}, the first {[*pictures[0].shape]}; '
                    'give pictures of one size'
                )
        pictures = np.array(pictures)
    if not pictures.size:
        raise InputError(f'pictures {[*pictures.shape]} are empty; give one or more')
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise InputError(f'pictures are {pictures.dtype} {[*pictures.shape]}; give uint8 [N,H,W,3]')
    return pictures


# --- how networks run


def _embedded(module, params, x):
    return module.apply({'params': params}, x)


def _pooled(module, params, ids):
    return module.apply({'params': params}, ids).pooled


def _apart(module, params, a, b):
    a, b = (module.apply({'params': params['trunk']}, x, method='maps') for x in (a, b))
    heads = params.get('heads')
    if heads is not None:
        heads = [heads[f'lin{i}.model.1']['kernel'].reshape(-1) for i in range(len(a))]
    return lpips.distance(a, b, heads)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(fn, module, home, params, *rows):
    # Accelerators would multiply float32 in fewer bits by default: FID shows it.
    with jax.default_matmul_precision('highest'):
        out = fn(module, params, *rows)
    return out if home is None else lax.with_sharding_constraint(out, home)


def _opened(kind, name, table, mesh, batch):
    """-> Backbone with its parameters on the devices, and run(network, fn, *rows): fn over equal
    batches of the rows, divided over the mesh; in numpy."""
    if batch < 1:
        raise InputError(f'batch = {batch}; give 1 or more')
    if mesh is not None and 'data' not in mesh.shape:
        raise InputError(f"the mesh has the axes {mesh.axis_names}; it needs one named 'data'")
    whole = parts = None
    if mesh is not None:
        whole, parts = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((), ('data',)))
        batch += -batch % mesh.shape['data']
    found = open_backbone(kind, name, table)
    found = found._replace(
        **{
            part: network._replace(params=weights.place(network.params, whole))
            for part in ('image', 'text')
            if (network := getattr(found, part)) is not None
        }
    )

    def put(x, pixels):
        x = x if pixels is None else pixels.host(x)
        x = jax.device_put(x) if parts is None else sharding.put(x, parts)
        return x if pixels is None else pixels.device(x)

    def run(network, fn, *rows):
        def one(index):
            put_rows = (put(x[index], network.pixels) for x in rows)
            return _compiled(fn, network.module, whole, network.params, *put_rows)

        return batched(one, np.arange(len(rows[0])), batch)

    return found, run
