"""FID's Inception-v3: the network of TensorFlow's file of 2015-12-05, as pytorch-fid ported it.

It differs from torchvision's Inception-v3 in its weights, in average pools that do not count the
padding, and in the last block, whose pool is a maximum. Names are those of the published file
`pt_inception-2015-12-05-6726825d.pth`. Architecture: arXiv 1512.00567; use in FID: arXiv 1706.08500.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

SIZE = 299  # px that pictures are resized to
WIDTH = 2048  # of the features
CLASSES = 1008  # of the file's classifier, which features do not need


class Conv(NamedTuple):
    """A convolution, its batch normalisation and a ReLU, under the file's name."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = 'SAME'


class Fork(NamedTuple):
    """Two convolutions of one input, side by side."""

    left: Conv
    right: Conv


AVERAGE = partial(nn.avg_pool, window_shape=(3, 3), padding='SAME', count_include_pad=False)
MAXIMUM = partial(nn.max_pool, window_shape=(3, 3), padding='SAME')
HALVE = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))

# A network is a chain of steps: a Conv, a Fork, a pool, or a Mixed block of parallel chains.
Conv3 = partial(Conv, kernel=(3, 3))
Last3 = partial(Conv, kernel=(3, 3), stride=2, padding='VALID')


def _a(pool):
    return (
        (Conv('branch1x1', 64),),
        (Conv('branch5x5_1', 48), Conv('branch5x5_2', 64, (5, 5))),
        (Conv('branch3x3dbl_1', 64), Conv3('branch3x3dbl_2', 96), Conv3('branch3x3dbl_3', 96)),
        (AVERAGE, Conv('branch_pool', pool)),
    )


def _c(width):
    row, column = (1, 7), (7, 1)
    return (
        (Conv('branch1x1', 192),),
        (
            Conv('branch7x7_1', width),
            Conv('branch7x7_2', width, row),
            Conv('branch7x7_3', 192, column),
        ),
        (
            Conv('branch7x7dbl_1', width),
            Conv('branch7x7dbl_2', width, column),
            Conv('branch7x7dbl_3', width, row),
            Conv('branch7x7dbl_4', width, column),
            Conv('branch7x7dbl_5', 192, row),
        ),
        (AVERAGE, Conv('branch_pool', 192)),
    )


def _e(pool):
    def fork(name):
        return Fork(Conv(f'{name}a', 384, (1, 3)), Conv(f'{name}b', 384, (3, 1)))

    return (
        (Conv('branch1x1', 320),),
        (Conv('branch3x3_1', 384), fork('branch3x3_2')),
        (Conv('branch3x3dbl_1', 448), Conv3('branch3x3dbl_2', 384), fork('branch3x3dbl_3')),
        (pool, Conv('branch_pool', 192)),
    )


STEM = (
    Last3('Conv2d_1a_3x3', 32),
    Conv3('Conv2d_2a_3x3', 32, padding='VALID'),
    Conv3('Conv2d_2b_3x3', 64),
    HALVE,
    Conv('Conv2d_3b_1x1', 80),
    Conv3('Conv2d_4a_3x3', 192, padding='VALID'),
    HALVE,
)
MIXED = {
    'Mixed_5b': _a(32),
    'Mixed_5c': _a(64),
    'Mixed_5d': _a(64),
    'Mixed_6a': (
        (Last3('branch3x3', 384),),
        (Conv('branch3x3dbl_1', 64), Conv3('branch3x3dbl_2', 96), Last3('branch3x3dbl_3', 96)),
        (HALVE,),
    ),
    'Mixed_6b': _c(128),
    'Mixed_6c': _c(160),
    'Mixed_6d': _c(160),
    'Mixed_6e': _c(192),
    'Mixed_7a': (
        (Conv('branch3x3_1', 192), Last3('branch3x3_2', 320)),
        (
            Conv('branch7x7x3_1', 192),
            Conv('branch7x7x3_2', 192, (1, 7)),
            Conv('branch7x7x3_3', 192, (7, 1)),
            Last3('branch7x7x3_4', 192),
        ),
        (HALVE,),
    ),
    'Mixed_7b': _e(AVERAGE),
    'Mixed_7c': _e(MAXIMUM),
}


class FrozenNorm(nn.Module):
    """Batch normalisation by the statistics of the file: x [..., C] -> [..., C]."""

    @nn.compact
    def __call__(self, x):
        shape, zeros, ones = x.shape[-1:], nn.initializers.zeros, nn.initializers.ones
        scale, bias = self.param('scale', ones, shape), self.param('bias', zeros, shape)
        mean = self.param('running_mean', zeros, shape)
        variance = self.param('running_var', ones, shape)
        return (x - mean) * (scale * lax.rsqrt(variance + 1e-3)) + bias


class BasicConv(nn.Module):
    """x [B,h,w,C] -> [B,h',w',width]."""

    spec: Conv

    @nn.compact
    def __call__(self, x):
        _, width, kernel, stride, padding = self.spec
        x = nn.Conv(width, kernel, stride, padding, use_bias=False, name='conv')(x)
        return nn.relu(FrozenNorm(name='bn')(x))


def _chain(x, steps):
    for step in steps:
        if isinstance(step, Conv):
            x = BasicConv(step, name=step.name)(x)
        elif isinstance(step, Fork):
            x = jnp.concatenate([BasicConv(conv, name=conv.name)(x) for conv in step], -1)
        else:
            x = step(x)
    return x


class Mixed(nn.Module):
    """Parallel chains, their outputs one behind the other: x [B,h,w,C] -> [B,h',w',D]."""

    branches: tuple

    @nn.compact
    def __call__(self, x):
        return jnp.concatenate([_chain(x, steps) for steps in self.branches], -1)


class Inception(nn.Module):
    """pictures [B,299,299,3] in -1..1 -> pool3 features [B,2048]."""

    @nn.compact
    def __call__(self, x):
        x = _chain(x, STEM)
        for name, branches in MIXED.items():
            x = Mixed(branches, name=name)(x)
        return x.mean((1, 2))
