"""CLIP's two towers (transformers `CLIPTextModel[WithProjection]`, `CLIPVisionModelWithProjection`)."""

import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcm_jax.models.attention import attend
from lcm_jax.models.layers import layer_norm

ACTIVATIONS = {
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
    'gelu': partial(nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class TowerSpec:
    """Sizes of a CLIP transformer."""

    width: int
    layers: int
    heads: int
    mlp: int  # width of the feed-forward layer
    act: str = 'quick_gelu'
    projection: int = 0  # width of the joint space (0: no projection)


@dataclasses.dataclass(frozen=True)
class TextSpec(TowerSpec):
    """Sizes of a text tower."""

    vocab: int = 49408
    length: int = 77  # positions
    eos: int = 2  # id of the end token; 2 stands for "the highest id" (OpenAI's first configs)


@dataclasses.dataclass(frozen=True)
class VisionSpec(TowerSpec):
    """Sizes of an image tower."""

    size: int = 224  # px
    patch: int = 32  # px


class TextOut(NamedTuple):
    """hidden [B,L,D] after the final norm; penultimate [B,L,D], a layer earlier; pooled [B,P]."""

    hidden: jax.Array
    penultimate: jax.Array
    pooled: jax.Array


class Layer(nn.Module):
    """Pre-norm transformer layer: x [B,L,D] -> [B,L,D]."""

    spec: TowerSpec
    causal: bool

    @nn.compact
    def __call__(self, x):
        s = self.spec
        y = layer_norm(name='layer_norm1')(x)

        def split(name):
            return nn.Dense(s.width, name=f'self_attn.{name}')(y).reshape(
                *y.shape[:-1], s.heads, -1
            )

        y = attend(split('q_proj'), split('k_proj'), split('v_proj'), causal=self.causal)
        x += nn.Dense(s.width, name='self_attn.out_proj')(y.reshape(x.shape))
        y = nn.Dense(s.mlp, name='mlp.fc1')(layer_norm(name='layer_norm2')(x))
        return x + nn.Dense(s.width, name='mlp.fc2')(ACTIVATIONS[s.act](y))


class TextEncoder(nn.Module):
    """ids [B,L] int -> TextOut.

    skip: layers left out at the end of `hidden` and `penultimate` (diffusers `clip_skip`); `pooled`
    is always the last layer's.
    """

    spec: TextSpec

    @nn.compact
    def __call__(self, ids, skip=0):
        s = self.spec
        x = nn.Embed(s.vocab, s.width, name='text_model.embeddings.token_embedding')(ids)
        x += nn.Embed(s.length, s.width, name='text_model.embeddings.position_embedding')(
            jnp.arange(ids.shape[1])
        )
        states = [x]
        for i in range(s.layers):
            states.append(Layer(s, True, name=f'text_model.encoder.layers.{i}')(states[-1]))
        ends = jnp.stack([states[-1], states[-1 - skip]])
        last, hidden = layer_norm(name='text_model.final_layer_norm')(ends)
        end = jnp.argmax(ids if s.eos == 2 else ids == s.eos, axis=1)
        pooled = jnp.take_along_axis(last, end[:, None, None], 1)[:, 0]
        if s.projection:
            pooled = nn.Dense(s.projection, use_bias=False, name='text_projection')(pooled)
        return TextOut(hidden, states[-2 - skip], pooled)


class ImageEncoder(nn.Module):
    """pictures [B,size,size,3], normalised -> embedding [B,projection]."""

    spec: VisionSpec

    def __call__(self, x):
        return self._run(x)[0]

    def maps(self, x):
        """-> what each layer says of the patches, [B,size/patch,size/patch,D] of each."""
        side = self.spec.size // self.spec.patch
        return [y[:, 1:].reshape(len(y), side, side, -1) for y in self._run(x)[1]]

    @nn.compact
    def _run(self, x):
        s = self.spec
        name = 'vision_model.embeddings.'
        x = nn.Conv(
            s.width,
            (s.patch, s.patch),
            s.patch,
            padding='VALID',
            use_bias=False,
            name=name + 'patch_embedding',
        )(x)
        x = x.reshape(x.shape[0], -1, s.width)
        first = self.param(name + 'class_embedding', nn.initializers.normal(0.02), (s.width,))
        first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, s.width))
        x = jnp.concatenate([first, x], 1)
        x += nn.Embed(x.shape[1], s.width, name=name + 'position_embedding')(jnp.arange(x.shape[1]))
        x = layer_norm(name='vision_model.pre_layrnorm')(x)
        states = []
        for i in range(s.layers):
            x = Layer(s, False, name=f'vision_model.encoder.layers.{i}')(x)
            states.append(x)
        x = layer_norm(name='vision_model.post_layernorm')(x[:, 0])
        return nn.Dense(s.projection, use_bias=False, name='visual_projection')(x), states
