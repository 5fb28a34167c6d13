"""Layers that the UNet and the VAE share. Names inside are diffusers'; layout is NHWC."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from lcm_jax.models.attention import attend

LARGE_KERNEL = 2**20  # numbers; below it a product saves no time and costs compilation


def _conv(x, kernel, strides, padding, **kwargs):
    """`lax.conv_general_dilated` of x [B,h,w,I] and kernel [a,b,I,O], undilated and of one group.

    XLA's CPU convolution is slow where a large kernel outweighs the picture, as in the coarse levels
    of SD's UNet; a product of matrices is up to 2 times as fast there, 10 for the gradient of x.
    """

    def direct(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

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


conv3 = partial(
    nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)), conv_general_dilated_cls=lambda: _conv
)

# Flax's default variance E[x^2] - E[x]^2 costs a UNet's output a decimal digit in float32 and saves no time.
group_norm = partial(nn.GroupNorm, use_fast_variance=False)
layer_norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


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
        h = conv3(self.width, name='conv1')(nn.silu(norm(name='norm1')(x)))
        if temb is not None:
            h += nn.Dense(self.width, name='time_emb_proj')(nn.silu(temb))[:, None, None]
        h = conv3(self.width, name='conv2')(nn.silu(norm(name='norm2')(h)))
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), name='conv_shortcut')(x)
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
