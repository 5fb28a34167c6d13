"""Conditional UNet of Stable Diffusion (diffusers `UNet2DConditionModel`). Models are rows of data."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.errors import choose
from lcm_jax.models.layers import (
    Attention,
    Conv1,
    Conv3,
    ResNet,
    group_norm,
    layer_norm,
    sincos,
    upsample,
)


@dataclasses.dataclass(frozen=True)
class UNetSpec:
    """Sizes of a conditional UNet. Levels run from the finest resolution to the coarsest."""

    widths: tuple[int, ...]  # channels of each level
    # [level][resnet] -> depth of the transformer after it (0: none)
    down: tuple[tuple[int, ...], ...]
    mid: int | None  # transformer depth in the middle (None: one lone resnet, as in SSD-1B)
    up: tuple[tuple[int, ...], ...]  # as `down`, from the coarsest level to the finest
    heads: tuple[int, ...]  # attention heads of each level
    context_dim: int  # width of the text embedding
    linear_proj: bool = False  # proj_in / proj_out: dense (SD 2, SDXL) instead of 1x1 conv (SD 1)
    size_dim: int = 0  # SDXL: width of each sin/cos size and crop embedding
    pooled_dim: int = 0  # SDXL: width of the pooled text embedding
    w_dim: int = 0  # LCM: width of the guidance-scale embedding
    in_channels: int = 4
    out_channels: int = 4
    groups: int = 32

    @property
    def factor(self):
        """How many times coarser the coarsest level is than the latents."""
        return 2 ** (len(self.widths) - 1)


# What a backward pass keeps of the forward pass, and what it computes again: how to wrap the class of
# a resnet or transformer block. One differentiates the student alone, so that only it pays.
REMAT = {
    'none': lambda block: block,
    'blocks': nn.remat,  # keeps the inputs of each
}


class TimeMLP(nn.Module):
    """diffusers `TimestepEmbedding`: x [B,E], w [B,W] or None -> [B,width]."""

    width: int

    @nn.compact
    def __call__(self, x, w=None):
        if w is not None:
            x += nn.Dense(x.shape[-1], use_bias=False, name='cond_proj')(w)
        return nn.Dense(self.width, name='linear_2')(
            nn.silu(nn.Dense(self.width, name='linear_1')(x))
        )


class Block(nn.Module):
    """diffusers `BasicTransformerBlock`: self-attention, cross-attention, GEGLU feed-forward."""

    heads: int

    @nn.compact
    def __call__(self, x, context):
        x += Attention(self.heads, name='attn1')(layer_norm(name='norm1')(x))
        x += Attention(self.heads, name='attn2')(layer_norm(name='norm2')(x), context)
        h = nn.Dense(8 * x.shape[-1], name='ff.net.0.proj')(layer_norm(name='norm3')(x))
        h, gate = jnp.split(h, 2, -1)
        return x + nn.Dense(x.shape[-1], name='ff.net.2')(h * nn.gelu(gate, approximate=False))


class Transformer(nn.Module):
    """diffusers `Transformer2DModel`: x [B,h,w,C], context [B,L,D] -> [B,h,w,C]."""

    depth: int
    heads: int
    groups: int
    linear_proj: bool
    remat: str

    @nn.compact
    def __call__(self, x, context):
        block = REMAT[self.remat](Block)
        c = x.shape[-1]
        proj = partial(nn.Dense, c) if self.linear_proj else partial(Conv1, c)
        y = group_norm(self.groups, epsilon=1e-6, name='norm')(x)
        y = proj(name='proj_in')(y).reshape(len(x), -1, c)
        for i in range(self.depth):
            y = block(self.heads, name=f'transformer_blocks.{i}')(y, context)
        return x + proj(name='proj_out')(y.reshape(x.shape))


class UNet(nn.Module):
    """out [B,h,w,out_channels] = UNet(spec)(z [B,h,w,in_channels], t [B], context [B,L,D], ...).

    pooled [B,P] and sizes [B,6] (original height, width, crop top, left, target height, width; px)
    are SDXL's; w [B,w_dim] is the embedded guidance scale of a full LCM. The output's dtype is
    that of the parameters and z. remat is a key of REMAT.
    """

    spec: UNetSpec
    remat: str = 'none'

    @nn.compact
    def __call__(self, z, t, context, *, pooled=None, sizes=None, w=None):
        s = self.spec
        resnet = choose('remat', self.remat, REMAT)(ResNet)
        mlp = partial(TimeMLP, 4 * s.widths[0])
        temb = mlp(name='time_embedding')(sincos(t, s.widths[0]).astype(z.dtype), w)
        if s.pooled_dim:
            size = sincos(sizes.reshape(-1), s.size_dim).reshape(z.shape[0], -1).astype(z.dtype)
            temb += mlp(name='add_embedding')(jnp.concatenate([pooled, size], -1))

        def slot(x, level, name, j, depth):  # one resnet and the transformer after it
            x = resnet(s.widths[level], s.groups, 1e-5, name=f'{name}.resnets.{j}')(x, temb)
            if depth:
                transformer = Transformer(
                    depth,
                    s.heads[level],
                    s.groups,
                    s.linear_proj,
                    self.remat,
                    name=f'{name}.attentions.{j}',
                )
                x = transformer(x, context)
            return x

        x = Conv3(s.widths[0], name='conv_in')(z)
        skips = [x]
        for i, depths in enumerate(s.down):
            for j, depth in enumerate(depths):
                x = slot(x, i, f'down_blocks.{i}', j, depth)
                skips.append(x)
            if i < len(s.down) - 1:
                x = Conv3(s.widths[i], strides=2, name=f'down_blocks.{i}.downsamplers.0.conv')(x)
                skips.append(x)

        x = slot(x, -1, 'mid_block', 0, s.mid)
        if s.mid is not None:
            x = slot(x, -1, 'mid_block', 1, 0)

        for i, depths in enumerate(s.up):
            for j, depth in enumerate(depths):
                x = slot(jnp.concatenate([x, skips.pop()], -1), -1 - i, f'up_blocks.{i}', j, depth)
            if i < len(s.up) - 1:
                height, width = skips[-1].shape[1:3]
                x = upsample(x)[:, :height, :width]  # less a row where odd
                x = Conv3(s.widths[-1 - i], name=f'up_blocks.{i}.upsamplers.0.conv')(x)

        x = nn.silu(group_norm(s.groups, epsilon=1e-5, name='conv_norm_out')(x))
        return Conv3(s.out_channels, name='conv_out')(x)
