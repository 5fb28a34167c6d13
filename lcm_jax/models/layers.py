"""Layers that the UNet and the VAE share. Names inside are diffusers'; layout is NHWC, or strips."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from lcm_jax.models.attention import attend

LARGE_KERNEL = 2**20  # numbers; below it a product saves no time and costs compilation


def strips_for(samples):
    """How many strips of each picture TPUs want, by the samples of one device: 8 strips in all.

    Their convolutions fill a register's 8 rows with the batch. A smaller one XLA cuts up and puts
    together again around each convolution: more than half of the bytes that a VAE's decoder moves.
    """
    return 1 << (7 // samples).bit_length()


def to_strips(x, n):
    """Pictures [B,h,w,C] -> n upright strips of each, [B,h,w/n,n,C]: another batch for convolutions.

    UNet and VAE take either and return the same. w/n must be a multiple of all their strides.
    """
    b, h, w, c = x.shape
    return x.reshape(b, h, n, w // n, c).swapaxes(2, 3)


def from_strips(x):
    """The inverse of `to_strips`."""
    b, h, w, n, c = x.shape
    return x.swapaxes(2, 3).reshape(b, h, n * w, c)


def for_strips(n, platform):
    """n samples of one device -> what `in_strips` is told of them: None but on TPUs."""
    return n if platform == 'tpu' else None


def in_strips(fn, x, stride, samples):
    """fn of pictures x [B,h,w,C], which may take strips instead, by as many as TPUs want.

    stride: the product of all strides in fn; the strips' width must be a multiple of it. samples:
    those of one device, less than B where the compiler divides the batch; None: pictures stay whole, as
    strips pay on TPUs only.
    """
    n = 1 if samples is None else strips_for(samples)
    while n > 1 and x.shape[2] % (n * stride):
        n //= 2
    return from_strips(fn(to_strips(x, n))) if n > 1 else fn(x)


def _halo(x, left, right):
    """Strips [B,h,w,n,C] with columns of their neighbours at both sides; zeros outside the picture."""
    before = jnp.pad(x[:, :, x.shape[2] - left :, :-1], ((0, 0),) * 3 + ((1, 0), (0, 0)))
    after = jnp.pad(x[:, :, :right, 1:], ((0, 0),) * 3 + ((0, 1), (0, 0)))
    return jnp.concatenate([before, x, after], 2)


def _conv(x, kernel, strides, padding):
    """`lax.conv_general_dilated` of x [B,h,w,I] and kernel [a,b,I,O].

    XLA's CPU convolution is slow where a large kernel outweighs the picture, as in the coarse levels
    of SD's UNet; a product of matrices is up to 2 times as fast there, 10 for the gradient of x.
    """

    def direct(x, kernel):
        layout = ('NHWC', 'HWIO', 'NHWC')
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)

    def product(x, kernel):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        ends = [n - k + 1 for n, k in zip(x.shape[1:3], kernel.shape, strict=False)]
        patches = [
            x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            for i in range(kernel.shape[0])
            for j in range(kernel.shape[1])
        ]
        return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])

    if kernel.size < LARGE_KERNEL or x.size // x.shape[-1] > kernel.shape[-1]:
        return direct(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=product, default=direct)


class Conv3(nn.Module):
    """3x3 convolution: x [B,h,w,C] -> [B,h/strides,w/strides,features], or strips of such.

    Raises ValueError where a stride does not divide the strips' width.
    """

    features: int
    strides: int = 1
    padding: tuple = ((1, 1), (1, 1))  # of rows and columns
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        bias = self.param('bias', nn.initializers.zeros, shape[-1:]) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        (rows, columns), strides = self.padding, (self.strides,) * 2
        if x.ndim == 4:
            y = _conv(x, kernel, strides, self.padding)
        else:
            if x.shape[2] % self.strides:
                raise ValueError(f'strips {x.shape[2]} columns wide cannot take strides of 2')
            x = jnp.moveaxis(_halo(x, *columns), -2, 1)
            y = _conv(x.reshape(-1, *x.shape[2:]), kernel, strides, (rows, (0, 0)))
            y = jnp.moveaxis(y.reshape(*x.shape[:2], *y.shape[1:]), 1, -2)
        return y if bias is None else y + bias


class Conv1(nn.Module):
    """1x1 convolution: x [..., C] -> [..., features]. As a product: XLA would turn its kernel around."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (1, 1, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        bias = self.param('bias', nn.initializers.zeros, shape[-1:]) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        y = x @ kernel[0, 0]
        return y if bias is None else y + bias


def _norm(cls, *args, **kwargs):
    """Flax's module cls(*args, **kwargs), built when its input comes.

    The variance E[x^2] - E[x]^2 costs a UNet's output a decimal digit in float32 and saves no time.
    Half precision has no such digit, and accelerators read x once instead of twice.
    """
    return lambda x: cls(*args, use_fast_variance=x.dtype != jnp.float32, **kwargs)(x)


group_norm = partial(_norm, nn.GroupNorm)
layer_norm = partial(_norm, nn.LayerNorm, epsilon=1e-5)


def sincos(t, dim):
    """t [B] -> sinusoidal embedding [B, dim] float32, cosines first (diffusers `Timesteps`)."""
    freq = jnp.exp(-jnp.log(10_000.0) * jnp.arange(dim // 2) / (dim // 2))
    angle = t[:, None].astype(jnp.float32) * freq
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def upsample(x):
    """[B,h,w,C] -> [B,2h,2w,C], nearest."""
    return x.repeat(2, 1).repeat(2, 2)


class ResNet(nn.Module):
    """diffusers `ResnetBlock2D`: x [B,h,w,C], temb [B,D] or None -> [B,h,w,width]."""

    width: int
    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x, temb=None):
        norm = partial(group_norm, self.groups, epsilon=self.epsilon)
        h = Conv3(self.width, name='conv1')(nn.silu(norm(name='norm1')(x)))
        if temb is not None:
            temb = nn.Dense(self.width, name='time_emb_proj')(nn.silu(temb))
            h += jnp.expand_dims(temb, range(1, h.ndim - 1))
        h = Conv3(self.width, name='conv2')(nn.silu(norm(name='norm2')(h)))
        if x.shape[-1] != self.width:
            x = Conv1(self.width, name='conv_shortcut')(x)
        return x + h


class Attention(nn.Module):
    """diffusers `Attention`: x [B,L,D], context [B,M,E] (default x) -> [B,L,D]."""

    heads: int
    bias: bool = False  # of q, k, v

    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        width = x.shape[-1]

        def split(y, name):
            y = nn.Dense(width, use_bias=self.bias, name=name)(y)
            return y.reshape(*y.shape[:-1], self.heads, -1)

        y = attend(split(x, 'to_q'), split(context, 'to_k'), split(context, 'to_v'))
        return nn.Dense(width, name='to_out.0')(y.reshape(x.shape))
