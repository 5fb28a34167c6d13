"""config.json of diffusers and transformers <-> specs. A size the modules cannot build is refused."""

from lcm_jax.errors import InputError
from lcm_jax.models.clip import ACTIVATIONS, TextSpec, VisionSpec
from lcm_jax.models.tiny import TinySpec
from lcm_jax.models.unet import UNetSpec
from lcm_jax.models.vae import VAESpec

# Keys that change the computation, with the only values that these modules compute. The first is
# diffusers' default where the key is absent; a list of block types is checked entry by entry.
UNET_ONLY = {
    'act_fn': ('silu',),
    'addition_embed_type': (None, 'text_time'),
    'attention_type': ('default',),
    'center_input_sample': (False,),
    'class_embed_type': (None,),
    'conv_in_kernel': (3,),
    'conv_out_kernel': (3,),
    'cross_attention_norm': (None,),
    'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
    'downsample_padding': (1,),
    'dual_cross_attention': (False,),
    'encoder_hid_dim': (None,),
    'encoder_hid_dim_type': (None,),
    'flip_sin_to_cos': (True,),
    'freq_shift': (0,),
    'mid_block_scale_factor': (1,),
    'mid_block_type': ('UNetMidBlock2DCrossAttn', 'UNetMidBlock2D'),
    'norm_eps': (1e-5,),
    'num_class_embeds': (None,),
    'only_cross_attention': (False,),
    'resnet_out_scale_factor': (1,),
    'resnet_time_scale_shift': ('default',),
    'time_embedding_act_fn': (None,),
    'time_embedding_dim': (None,),
    'time_embedding_type': ('positional',),
    'timestep_post_act': (None,),
    'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'),
}
VAE_ONLY = {
    'act_fn': ('silu',),
    'down_block_types': ('DownEncoderBlock2D',),
    'in_channels': (3,),
    'latents_mean': (None,),
    'latents_std': (None,),
    'mid_block_add_attention': (True,),
    'out_channels': (3,),
    'shift_factor': (None,),
    'up_block_types': ('UpDecoderBlock2D',),
    'use_post_quant_conv': (True,),
    'use_quant_conv': (True,),
}
TINY_ONLY = {
    'act_fn': ('relu',),
    'in_channels': (3,),
    'out_channels': (3,),
    'shift_factor': (0.0, None),
    'upsample_fn': ('nearest',),
    'upsampling_scaling_factor': (2,),
}
# transformers' sizes of a CLIPModel's towers, where its config.json is silent.
CLIP_DEFAULTS = {
    'text_config': {
        'hidden_size': 512,
        'intermediate_size': 2048,
        'num_hidden_layers': 12,
        'num_attention_heads': 8,
        'vocab_size': 49408,
        'max_position_embeddings': 77,
        'eos_token_id': 49407,
    },
    'vision_config': {
        'hidden_size': 768,
        'intermediate_size': 3072,
        'num_hidden_layers': 12,
        'num_attention_heads': 12,
        'image_size': 224,
        'patch_size': 32,
    },
}
CLIP_ONLY = {'hidden_act': tuple(ACTIVATIONS), 'layer_norm_eps': (1e-5,), 'num_channels': (3,)}


class Config(dict):
    """A config.json whose unsupported values and absent keys are errors that name the file."""

    def __init__(self, config, only, source):
        if not isinstance(config, dict):
            raise InputError(f'{source} holds a {type(config).__name__}, not an object of keys')
        super().__init__(config)
        self.source = source
        for key, accepted in only.items():
            for value in _list(config.get(key, accepted[0])):
                if value not in accepted:
                    raise InputError(
                        f'{source}: {key} = {value!r} is not supported; '
                        f'accepted: {", ".join(map(repr, accepted))}'
                    )

    def __missing__(self, key):
        raise InputError(f'{self.source}: the key {key!r} is missing')

    def levels(self, key, value, levels):
        """`value`, or an equal copy per level; `key` names it in the error."""
        if not isinstance(value, (list, tuple)):
            return (value,) * levels
        if len(value) != levels:
            raise InputError(
                f'{self.source}: {key} = {value} has {len(value)} entries instead of {levels}'
            )
        return tuple(value)


def _list(value):
    return value if isinstance(value, (list, tuple)) else [value]


def unet_spec(config, source='unet/config.json'):
    """config.json of a `UNet2DConditionModel` -> UNetSpec."""
    config = Config(config, UNET_ONLY, source)
    widths = tuple(config['block_out_channels'])
    n = len(widths)

    def per_level(key, default):
        return config.levels(key, config.get(key, default), n)

    def transformers(kinds, key, depths, resnets):  # -> [level][resnet] depth; 0 in plain blocks
        kinds = config.levels(kinds, config[kinds], n)
        return tuple(
            config.levels(key, d, r) if 'CrossAttn' in kind else (0,) * r
            for kind, d, r in zip(kinds, depths, resnets, strict=True)
        )

    resnets = per_level('layers_per_block', 2)
    key, up_key = 'transformer_layers_per_block', 'reverse_transformer_layers_per_block'
    depths = per_level(key, 1)
    up_depths = per_level(up_key, None) if config.get(up_key) else depths[::-1]
    contexts = set(_list(config['cross_attention_dim']))
    if len(contexts) != 1:
        raise InputError(
            f'{source}: cross_attention_dim = {config["cross_attention_dim"]} differs '
            'between levels; one number is supported'
        )
    text_time = config.get('addition_embed_type') == 'text_time'
    size_dim = config['addition_time_embed_dim'] if text_time else 0
    lone = config.get('mid_block_type') == 'UNetMidBlock2D'
    # In these models attention_head_dim holds the number of heads (diffusers issue 2011).
    heads_key = 'num_attention_heads' if config.get('num_attention_heads') else 'attention_head_dim'
    return UNetSpec(
        widths=widths,
        down=transformers('down_block_types', key, depths, resnets),
        mid=None if lone else _list(depths[-1])[0],
        up=transformers('up_block_types', up_key, up_depths, [r + 1 for r in resnets[::-1]]),
        heads=per_level(heads_key, 8),
        context_dim=contexts.pop(),
        linear_proj=config.get('use_linear_projection', False),
        size_dim=size_dim,
        pooled_dim=config['projection_class_embeddings_input_dim'] - 6 * size_dim
        if text_time
        else 0,
        w_dim=config.get('time_cond_proj_dim') or 0,
        in_channels=config.get('in_channels', 4),
        out_channels=config.get('out_channels', 4),
        groups=config.get('norm_num_groups', 32),
    )


def unet_config(spec, sample_size):
    """UNetSpec -> config.json that diffusers loads; the inverse of `unet_spec`.

    Raises InputError for a middle deeper or shallower than the coarsest level's transformers:
    diffusers' config has one entry for both.
    """

    def entry(depths, idle=1):  # a number where a level's resnets agree; `idle` for a plain block
        return list(depths) if len(set(depths)) > 1 else depths[0] or idle

    def kinds(levels, kind):
        return [f'CrossAttn{kind}' if any(depths) else kind for depths in levels]

    down = [entry(d) for d in spec.down[:-1]] + [entry(spec.down[-1], spec.mid or 1)]
    up = [entry(d, down[-1 - i]) for i, d in enumerate(spec.up)]
    if spec.mid is not None and spec.mid != _list(down[-1])[0]:
        raise InputError(
            f'diffusers has no config for a middle of depth {spec.mid} '
            f'beside a coarsest level of {spec.down[-1]}'
        )
    resnets = [len(d) for d in spec.down]
    config = {
        '_class_name': 'UNet2DConditionModel',
        'sample_size': sample_size,
        'block_out_channels': list(spec.widths),
        'layers_per_block': resnets if len(set(resnets)) > 1 else resnets[0],
        'down_block_types': kinds(spec.down, 'DownBlock2D'),
        'mid_block_type': 'UNetMidBlock2D' if spec.mid is None else 'UNetMidBlock2DCrossAttn',
        'up_block_types': kinds(spec.up, 'UpBlock2D'),
        'transformer_layers_per_block': down,
        'attention_head_dim': list(spec.heads),
        'cross_attention_dim': spec.context_dim,
        'use_linear_projection': spec.linear_proj,
        'in_channels': spec.in_channels,
        'out_channels': spec.out_channels,
        'norm_num_groups': spec.groups,
    }
    if up != down[::-1] or any(isinstance(d, list) for d in down):
        config['reverse_transformer_layers_per_block'] = up
    if spec.size_dim:
        config |= {
            'addition_embed_type': 'text_time',
            'addition_time_embed_dim': spec.size_dim,
            'projection_class_embeddings_input_dim': spec.pooled_dim + 6 * spec.size_dim,
        }
    if spec.w_dim:
        config['time_cond_proj_dim'] = spec.w_dim
    return config


def vae_spec(config, source='vae/config.json'):
    """config.json of an `AutoencoderKL` or `AutoencoderTiny` -> VAESpec or TinySpec."""
    classes = {'_class_name': ('AutoencoderKL', 'AutoencoderTiny')}
    config = Config(config, classes, source)
    if config.get('_class_name') == 'AutoencoderTiny':
        return _tiny_spec(Config(config, TINY_ONLY, source))
    config = Config(config, VAE_ONLY, source)
    return VAESpec(
        widths=tuple(config['block_out_channels']),
        resnets=config.get('layers_per_block', 1),
        latent_channels=config.get('latent_channels', 4),
        groups=config.get('norm_num_groups', 32),
        scaling_factor=config.get('scaling_factor', 0.18215),
    )


def _tiny_spec(config):
    sizes = {
        part: tuple(config.get(key, default))
        for part, key, default in (
            ('encoder', 'encoder_block_out_channels', TinySpec.encoder),
            ('encoder_blocks', 'num_encoder_blocks', TinySpec.encoder_blocks),
            ('decoder', 'decoder_block_out_channels', TinySpec.decoder),
            ('decoder_blocks', 'num_decoder_blocks', TinySpec.decoder_blocks),
        )
    }
    if len({*map(len, sizes.values())}) != 1:
        raise InputError(f'{config.source}: as many levels everywhere are needed, not {sizes}')
    return TinySpec(
        **sizes,
        latent_channels=config.get('latent_channels', 4),
        scaling_factor=config.get('scaling_factor', 1.0),
    )


def _tiny_config(spec):
    return {
        '_class_name': 'AutoencoderTiny',
        'encoder_block_out_channels': list(spec.encoder),
        'num_encoder_blocks': list(spec.encoder_blocks),
        'decoder_block_out_channels': list(spec.decoder),
        'num_decoder_blocks': list(spec.decoder_blocks),
        'latent_channels': spec.latent_channels,
        'scaling_factor': spec.scaling_factor,
    }


def vae_config(spec, sample_size):
    """VAESpec or TinySpec -> config.json that diffusers loads; the inverse of `vae_spec`."""
    if isinstance(spec, TinySpec):
        return _tiny_config(spec)
    n = len(spec.widths)
    return {
        '_class_name': 'AutoencoderKL',
        'sample_size': sample_size,
        'block_out_channels': list(spec.widths),
        'down_block_types': ['DownEncoderBlock2D'] * n,
        'up_block_types': ['UpDecoderBlock2D'] * n,
        'layers_per_block': spec.resnets,
        'latent_channels': spec.latent_channels,
        'norm_num_groups': spec.groups,
        'scaling_factor': spec.scaling_factor,
    }


def _tower(config):
    return {
        'width': config['hidden_size'],
        'layers': config['num_hidden_layers'],
        'heads': config['num_attention_heads'],
        'mlp': config['intermediate_size'],
        'act': config.get('hidden_act', 'quick_gelu'),
    }


def _tower_config(spec):
    return {
        'hidden_size': spec.width,
        'num_hidden_layers': spec.layers,
        'num_attention_heads': spec.heads,
        'intermediate_size': spec.mlp,
        'hidden_act': spec.act,
        'projection_dim': spec.projection or spec.width,
    }


def text_spec(config, source='text_encoder/config.json'):
    """config.json of a `CLIPTextModel` or `CLIPTextModelWithProjection` -> TextSpec."""
    config = Config(config, CLIP_ONLY, source)
    architecture = (config.get('architectures') or ['CLIPTextModel'])[0]
    if architecture not in ('CLIPTextModel', 'CLIPTextModelWithProjection'):
        raise InputError(
            f'{source}: architecture {architecture!r} is not supported; '
            'accepted: CLIPTextModel, CLIPTextModelWithProjection'
        )
    return TextSpec(
        **_tower(config),
        projection=config['projection_dim'] if architecture.endswith('WithProjection') else 0,
        vocab=config['vocab_size'],
        length=config['max_position_embeddings'],
        eos=config.get('eos_token_id', 2),
    )


def text_config(spec):
    """TextSpec -> config.json that transformers loads; the inverse of `text_spec`."""
    return {
        'architectures': ['CLIPTextModelWithProjection' if spec.projection else 'CLIPTextModel'],
        'model_type': 'clip_text_model',
        **_tower_config(spec),
        'vocab_size': spec.vocab,
        'max_position_embeddings': spec.length,
        'bos_token_id': spec.vocab - 2,
        'eos_token_id': spec.eos,
        'pad_token_id': spec.vocab - 1,
    }


def vision_spec(config, source='image_encoder/config.json'):
    """config.json of a `CLIPVisionModelWithProjection` -> VisionSpec."""
    config = Config(config, CLIP_ONLY, source)
    return VisionSpec(
        **_tower(config),
        projection=config['projection_dim'],
        size=config['image_size'],
        patch=config['patch_size'],
    )


def vision_config(spec):
    """VisionSpec -> config.json that transformers loads; the inverse of `vision_spec`."""
    return {
        'architectures': ['CLIPVisionModelWithProjection'],
        'model_type': 'clip_vision_model',
        **_tower_config(spec),
        'image_size': spec.size,
        'patch_size': spec.patch,
    }


def clip_specs(config, source='config.json'):
    """config.json of a `CLIPModel` -> TextSpec, VisionSpec."""
    config = Config(config, {'model_type': ('clip',)}, source)

    def tower(key):
        where = f'{source}: {key}'
        # Files of before 2023 say the same twice; transformers believes the second.
        said = (config[key], config.get(f'{key}_dict') or {})
        first, second = (Config(x, {}, where) for x in said)
        projection = {'projection_dim': config.get('projection_dim', 512)}
        return CLIP_DEFAULTS[key] | first | second | projection, where

    text, where = tower('text_config')
    text['architectures'] = ['CLIPTextModelWithProjection']
    return text_spec(text, where), vision_spec(*tower('vision_config'))
