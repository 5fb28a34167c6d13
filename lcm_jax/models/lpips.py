"""LPIPS, the learned perceptual distance (Zhang et al., arXiv 1801.03924), version 0.1.

Backbones are torchvision's AlexNet, VGG-16 and SqueezeNet 1.1 up to the last layer that counts, under
torchvision's names; linear heads are the `lpips` package's.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

# Pictures in -1..1 -> what torchvision's backbones were trained on (the package's ScalingLayer).
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10  # beside the length of a pixel's features


class Conv(NamedTuple):
    """A convolution and a ReLU: torchvision's module `features.INDEX`."""

    index: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1

    def __call__(self, x, name='features.{}'):
        kernel, padding = (self.kernel,) * 2, self.padding
        x = nn.Conv(self.width, kernel, self.stride, padding, name=name.format(self.index))(x)
        return nn.relu(x)


class Fire(NamedTuple):
    """SqueezeNet's block: a narrow 1x1 convolution, then a 1x1 and a 3x3 one side by side."""

    index: int
    squeeze: int
    expand: int

    def __call__(self, x):
        def conv(x, part, width, kernel=1):
            conv = Conv(self.index, width, kernel, padding=kernel // 2)
            return conv(x, f'features.{{}}.{part}')

        x = conv(x, 'squeeze', self.squeeze)
        both = conv(x, 'expand1x1', self.expand), conv(x, 'expand3x3', self.expand, 3)
        return jnp.concatenate(both, -1)


def _ceil_pool(x):
    """Maximum of 3x3 in steps of 2; torch's `ceil_mode`: the last window may reach over the edge."""
    over = [(0, (n - 3) % 2) for n in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), (2, 2), over)


POOL3 = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
POOL2 = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))


@dataclasses.dataclass(frozen=True)
class TrunkSpec:
    """A backbone: stages of steps; the output of each stage counts."""

    stages: tuple
    widths: tuple[int, ...]  # of the stages' outputs
    least: int  # px that a side must have, for the last stage to have any


TRUNKS = {
    'alex': TrunkSpec(
        (
            (Conv(0, 64, 11, 4, 2),),
            (POOL3, Conv(3, 192, 5, padding=2)),
            (POOL3, Conv(6, 384)),
            (Conv(8, 256),),
            (Conv(10, 256),),
        ),
        (64, 192, 384, 256, 256),
        31,
    ),
    'vgg': TrunkSpec(
        (
            (Conv(0, 64), Conv(2, 64)),
            (POOL2, Conv(5, 128), Conv(7, 128)),
            (POOL2, Conv(10, 256), Conv(12, 256), Conv(14, 256)),
            (POOL2, Conv(17, 512), Conv(19, 512), Conv(21, 512)),
            (POOL2, Conv(24, 512), Conv(26, 512), Conv(28, 512)),
        ),
        (64, 128, 256, 512, 512),
        16,
    ),
    'squeeze': TrunkSpec(
        (
            (Conv(0, 64, stride=2, padding=0),),
            (_ceil_pool, Fire(3, 16, 64), Fire(4, 16, 64)),
            (_ceil_pool, Fire(6, 32, 128), Fire(7, 32, 128)),
            (_ceil_pool, Fire(9, 48, 192)),
            (Fire(10, 48, 192),),
            (Fire(11, 64, 256),),
            (Fire(12, 64, 256),),
        ),
        (64, 128, 256, 384, 384, 512, 512),
        17,
    ),
}


class Trunk(nn.Module):
    """pictures [B,H,W,3] in -1..1 -> the feature maps [B,h,w,C] of all stages."""

    spec: TrunkSpec

    @nn.compact
    def maps(self, x):
        x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
        out = []
        for stage in self.spec.stages:
            for step in stage:
                x = step(x)
            out.append(x)
        return out

    def __call__(self, x):
        return self.maps(x)


def distance(a, b, heads=None):
    """Lists of feature maps [B,h,w,C] of two sets of pictures -> their distances [B].

    The squared difference of the features of a pixel, each scaled to length one, weighted by the
    layer's head [C] (ones without), averaged over pixels and summed over layers.
    """
    total = 0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        weights = 1 if heads is None else heads[i]
        total += (weights * (_unit(x) - _unit(y)) ** 2).sum(-1).mean((1, 2))
    return total


def _unit(x):
    return x / (jnp.sqrt((x * x).sum(-1, keepdims=True)) + EPSILON)
