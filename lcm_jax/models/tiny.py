"""Tiny autoencoder for fast previews: TAESD (diffusers `AutoencoderTiny`)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lcm_jax.models.layers import Conv3, upsample
from lcm_jax.models.vae import VAE, VAESpec


@dataclasses.dataclass(frozen=True)
class TinySpec:
    """Sizes of the tiny autoencoder; its latents are those of a VAE times its scaling factor."""

    encoder: tuple[int, ...] = (64, 64, 64, 64)  # channels of each level, from the picture inwards
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder: tuple[int, ...] = (64, 64, 64, 64)  # from the latents outwards
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    scaling_factor: float = 1.0

    @property
    def factor(self):
        return 2 ** (len(self.encoder) - 1)


class Stack(nn.Module):
    """What encoder and decoder share: layers numbered as in torch's `Sequential`."""

    spec: TinySpec

    def block(self, x, i):
        """diffusers `AutoencoderTinyBlock` of equal widths."""
        h = x
        for j in (0, 2, 4):
            h = Conv3(x.shape[-1], name=f'layers.{i}.conv.{j}')(nn.relu(h) if j else h)
        return nn.relu(x + h)


class TinyEncoder(Stack):
    """Pictures [B,8h,8w,3] in -1..1 -> latents [B,h,w,C]; 8 is `spec.factor`."""

    @nn.compact
    def __call__(self, x):
        s, i = self.spec, 0
        x = (x + 1) / 2
        for level, (width, blocks) in enumerate(zip(s.encoder, s.encoder_blocks, strict=True)):
            first = {} if level == 0 else {'strides': 2, 'use_bias': False}
            x = Conv3(width, name=f'layers.{i}', **first)(x)
            for j in range(blocks):
                x = self.block(x, i + 1 + j)
            i += 1 + blocks
        return Conv3(s.latent_channels, name=f'layers.{i}')(x)


class TinyDecoder(Stack):
    """Latents [B,h,w,C] -> pictures [B,8h,8w,3] in -1..1; 8 is `spec.factor`."""

    @nn.compact
    def __call__(self, z):
        s, i = self.spec, 2  # layer 1 is a ReLU
        x = nn.relu(Conv3(s.decoder[0], name='layers.0')(3 * jnp.tanh(z / 3)))
        for level, (width, blocks) in enumerate(zip(s.decoder, s.decoder_blocks, strict=True)):
            last = level == len(s.decoder) - 1
            for j in range(blocks):
                x = self.block(x, i + j)
            i += blocks + (not last)  # the upsampling is a layer too
            x = Conv3(3 if last else width, use_bias=last, name=f'layers.{i}')(
                x if last else upsample(x)
            )
            i += 1
        return 2 * x - 1


class TinyVAE(nn.Module):
    """`VAE`'s methods and units; encode has no spread, so its logvar is the least that `VAE` gives."""

    spec: TinySpec

    def setup(self):
        self.encoder, self.decoder = TinyEncoder(self.spec), TinyDecoder(self.spec)

    def encode(self, x):
        z = self.encoder(x)
        return z, jnp.full_like(z, -30.0)

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, x):
        return self.decode(self.encode(x)[0])


def autoencoder(spec):
    """VAESpec or TinySpec -> its module; both have `encode` and `decode`."""
    return {VAESpec: VAE, TinySpec: TinyVAE}[type(spec)](spec)
