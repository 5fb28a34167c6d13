"""Autoencoder of Stable Diffusion (diffusers `AutoencoderKL`)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.models.layers import Attention, Conv3, ResNet, group_norm, upsample


@dataclasses.dataclass(frozen=True)
class VAESpec:
    """Sizes of the autoencoder; the picture is 2 ** (len(widths) - 1) times the latent grid."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2  # per level in the encoder; the decoder has one more
    latent_channels: int = 4
    groups: int = 32
    scaling_factor: float = 0.18215  # latents of unit variance = scaling_factor * encoded mean

    @property
    def factor(self):
        return 2 ** (len(self.widths) - 1)


class MidAttention(Attention):
    """One-head self-attention over the grid, with its norm and residual."""

    groups: int = 32

    @nn.compact
    def __call__(self, x):
        y = group_norm(self.groups, epsilon=1e-6, name='group_norm')(x)
        y = super().__call__(y.reshape(len(x), -1, x.shape[-1]))
        return x + y.reshape(x.shape)


class Coder(nn.Module):
    """What encoder and decoder share: resnets by name, the middle, the output layers."""

    spec: VAESpec

    def resnet(self, x, level, name):
        """x [B,h,w,C] -> [B,h,w,D], D the width of that level."""
        return ResNet(self.spec.widths[level], self.spec.groups, 1e-6, name=name)(x)

    def middle(self, x):
        """Resnet, attention, resnet of the coarsest grid; the shape stays."""
        x = self.resnet(x, -1, 'mid_block.resnets.0')
        x = MidAttention(1, bias=True, groups=self.spec.groups, name='mid_block.attentions.0')(x)
        return self.resnet(x, -1, 'mid_block.resnets.1')

    def output(self, x, channels):
        """x [B,h,w,C] -> [B,h,w,channels]."""
        x = nn.silu(group_norm(self.spec.groups, epsilon=1e-6, name='conv_norm_out')(x))
        return Conv3(channels, name='conv_out')(x)


class Encoder(Coder):
    """Pictures [B,8h,8w,3] -> [B,h,w,2C]: mean and logvar before `quant_conv`; 8 is `spec.factor`."""

    @nn.compact
    def __call__(self, x):
        s = self.spec
        x = Conv3(s.widths[0], name='conv_in')(x)
        for i, width in enumerate(s.widths):
            for j in range(s.resnets):
                x = self.resnet(x, i, f'down_blocks.{i}.resnets.{j}')
            if i < len(s.widths) - 1:
                x = Conv3(
                    width,
                    strides=2,
                    padding=((0, 1), (0, 1)),
                    name=f'down_blocks.{i}.downsamplers.0.conv',
                )(x)
        return self.output(self.middle(x), 2 * s.latent_channels)


class Decoder(Coder):
    """Latents after `post_quant_conv` [B,h,w,C] -> pictures [B,8h,8w,3]; 8 is `spec.factor`."""

    @nn.compact
    def __call__(self, z):
        s = self.spec
        x = self.middle(Conv3(s.widths[-1], name='conv_in')(z))
        for i, width in enumerate(reversed(s.widths)):
            for j in range(s.resnets + 1):
                x = self.resnet(x, -1 - i, f'up_blocks.{i}.resnets.{j}')
            if i < len(s.widths) - 1:
                x = Conv3(width, name=f'up_blocks.{i}.upsamplers.0.conv')(upsample(x))
        return self.output(x, 3)


class VAE(nn.Module):
    """encode: pictures [B,8h,8w,3] in -1..1 -> mean, logvar [B,h,w,C]; decode: z [B,h,w,C] -> pictures.

    Latents here are the encoder's own; the diffusion model sees them times `scaling_factor`.
    """

    spec: VAESpec

    def setup(self):
        s = self.spec
        self.encoder, self.decoder = Encoder(s), Decoder(s)
        self.quant_conv = nn.Conv(2 * s.latent_channels, (1, 1))
        self.post_quant_conv = nn.Conv(s.latent_channels, (1, 1))

    def encode(self, x):
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x)), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def __call__(self, x):
        """Encode and decode the mean; touches every parameter, so `init` can use it."""
        return self.decode(self.encode(x)[0])
