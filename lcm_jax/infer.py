"""What a single file in original names says of its model: specs from its keys and shapes alone."""

import re

import numpy as np

from lcm_jax.errors import InputError
from lcm_jax.models import configs
from lcm_jax.models.clip import TextSpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec

SIZE_DIM = 256  # SDXL: width of each size and crop embedding, which no shape tells
SCALING = {False: 0.18215, True: 0.13025}  # of a VAE beside an SDXL UNet or another
HEAD = 64  # width of an attention head, but for SD 1's UNet
CONTEXT = re.compile(r'(.*)\.transformer_blocks\.0\.attn2\.to_k\.weight')


class Shapes(dict):
    """{original key: shape} of a file, asked for sizes; an absent key is an error that names it."""

    def __init__(self, shapes, source):
        super().__init__(shapes)
        self.source = source
        self.modules = {key[: m.start()] for key in self for m in re.finditer(r'\.', key)}

    def __missing__(self, key):
        raise InputError(f'{self.source}: the key {key!r} is missing')

    def size(self, key, axis):
        if len(self[key]) <= axis:
            raise InputError(f'{self.source}: {key} has the shape {self[key]}')
        return self[key][axis]

    def count(self, module):
        """How many of module.0, module.1, ... there are."""
        n = 0
        while f'{module}.{n}' in self.modules:
            n += 1
        return n


def unet(shapes, prefix):
    """-> UNetSpec."""

    def block(name):  # -> depth of the transformer after a resnet, which is 0 for none
        return shapes.count(f'{prefix}{name}.1.transformer_blocks')

    down, up, widths = [[]], [[]], []
    for n in range(1, shapes.count(prefix + 'input_blocks')):
        if f'{prefix}input_blocks.{n}.0.op' in shapes.modules:
            down.append([])
            continue
        if not down[-1]:
            widths.append(shapes.size(f'{prefix}input_blocks.{n}.0.in_layers.2.weight', 0))
        down[-1].append(block(f'input_blocks.{n}'))
    for n in range(shapes.count(prefix + 'output_blocks')):
        up[-1].append(block(f'output_blocks.{n}'))
        if any(f'{prefix}output_blocks.{n}.{slot}.conv' in shapes.modules for slot in (1, 2)):
            up.append([])
    attention = next((m[1] for m in map(CONTEXT.fullmatch, sorted(shapes)) if m), None)
    if attention is None or len(widths) != len(down):
        raise InputError(f'{shapes.source}: its {prefix}* is no UNet of Stable Diffusion')
    linear = len(shapes[f'{attention}.proj_in.weight']) == 2
    time, added = f'{prefix}time_embed.cond_proj.weight', f'{prefix}label_emb.0.0.weight'
    size_dim = SIZE_DIM if added in shapes else 0
    return UNetSpec(
        widths=tuple(widths),
        down=tuple(map(tuple, down)),
        mid=block('middle_block') if f'{prefix}middle_block.1' in shapes.modules else None,
        up=tuple(map(tuple, up)),
        heads=tuple(max(1, w // HEAD) if linear else 8 for w in widths),
        context_dim=shapes.size(f'{attention}.transformer_blocks.0.attn2.to_k.weight', 1),
        linear_proj=linear,
        size_dim=size_dim,
        pooled_dim=shapes.size(added, 1) - 6 * size_dim if size_dim else 0,
        w_dim=shapes.size(time, 1) if time in shapes else 0,
        in_channels=shapes.size(prefix + 'input_blocks.0.0.weight', 1),
        out_channels=shapes.size(prefix + 'out.2.weight', 0),
    )


def vae(shapes, prefix, xl):
    """-> VAESpec; `xl`: beside an SDXL UNet."""
    down = f'{prefix}encoder.down'
    return VAESpec(
        widths=tuple(
            shapes.size(f'{down}.{i}.block.0.conv1.weight', 0) for i in range(shapes.count(down))
        ),
        resnets=shapes.count(f'{down}.0.block'),
        latent_channels=shapes.size(prefix + 'post_quant_conv.weight', 0),
        scaling_factor=SCALING[xl],
    )


def clip(shapes, prefix):
    """A text encoder in transformers' names -> TextSpec."""
    prefix += 'text_model.' if f'{prefix}text_model' in shapes.modules else ''
    vocab, width = (
        shapes.size(f'{prefix}embeddings.token_embedding.weight', axis) for axis in (0, 1)
    )
    return TextSpec(
        width=width,
        layers=shapes.count(f'{prefix}encoder.layers'),
        heads=max(1, width // HEAD),
        mlp=shapes.size(f'{prefix}encoder.layers.0.mlp.fc1.weight', 0),
        vocab=vocab,
        length=shapes.size(f'{prefix}embeddings.position_embedding.weight', 0),
    )


def open_clip(shapes, prefix, projected):
    """A text encoder in OpenCLIP's names -> TextSpec.

    SDXL uses the text projection (`projected`). SD 2 does not, nor the last layer: the whole tower
    has both, a tower that diffusers' users have written neither.
    """
    vocab, width = (shapes.size(f'{prefix}token_embedding.weight', axis) for axis in (0, 1))
    projection = f'{prefix}text_projection'
    unused = not projected and projection in shapes
    return TextSpec(
        width=width,
        layers=shapes.count(f'{prefix}transformer.resblocks') - unused,
        heads=max(1, width // HEAD),
        mlp=shapes.size(f'{prefix}transformer.resblocks.0.mlp.c_fc.weight', 0),
        act='gelu',
        projection=shapes.size(projection, 1) if projected else 0,
        vocab=vocab,
        length=shapes.size(f'{prefix}positional_embedding', 0),
    )


def prediction_type(tensors, metadata, prefix):
    """What the UNet predicts: a key 'v_pred', else the metadata's word, else a guess for SD 2.

    The key comes first, as in ComfyUI: metadata may be of a model that the file was merged from.

    Nothing in the keys tells SD 2's v-prediction models from its epsilon ones (2-base, 2.1-base and
    inpainting). ComfyUI's rule, which we follow: in 4-channel v-prediction models the bias of the
    last transformer's first norm has a standard deviation above 0.09. That a UNet of this depth is
    SD 2's its linear projections tell, with its text encoder in the file or without.
    """
    if 'v_pred' in tensors:
        return 'v_prediction'
    said = metadata.get('modelspec.prediction_type')
    if said in ('v', 'v_prediction', 'epsilon'):
        return 'epsilon' if said == 'epsilon' else 'v_prediction'
    first, last = f'{prefix}input_blocks.0.0.weight', f'{prefix}output_blocks.11.1'
    keys = first, f'{last}.proj_in.weight', f'{last}.transformer_blocks.0.norm1.bias'
    if any(key not in tensors for key in keys):
        return 'epsilon'
    x, linear, bias = (tensors[key] for key in keys)
    guess = x.shape[1:2] == (4,) and linear.ndim == 2 and np.asarray(bias).std(dtype=float) > 0.09
    return 'v_prediction' if guess else 'epsilon'


def components(shapes, parts, kind='epsilon'):
    """{component: Part} of a file -> {component: config.json}, as diffusers would write them.

    kind: what the UNet predicts; SD 2's models of v were trained with larger pictures. A VAE's
    scaling factor only the UNet beside it tells.
    """
    out, xl, side = {}, False, 64
    if 'unet' in parts:
        spec = unet(shapes, parts['unet'].prefix)
        xl = bool(spec.size_dim)
        side = 128 if xl else 96 if spec.linear_proj and kind == 'v_prediction' else 64
        out['unet'] = configs.unet_config(spec, side)
    if 'vae' in parts:
        out['vae'] = configs.vae_config(vae(shapes, parts['vae'].prefix, xl), 8 * side)
        if 'unet' not in parts:
            del out['vae']['scaling_factor']
    for name in ('text_encoder', 'text_encoder_2'):
        if name in parts:
            prefix = parts[name].prefix
            spec = (
                clip(shapes, prefix)
                if prefix.endswith('transformer.')
                else open_clip(shapes, prefix, name == 'text_encoder_2')
            )
            out[name] = configs.text_config(spec)
    return out
