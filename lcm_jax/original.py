"""Names of the original (CompVis, sgm) checkpoints for the modules of diffusers.

Derived from diffusers' own module names alone: the counters of the original blocks follow from
which blocks there are. https://github.com/CompVis/latent-diffusion, `openaimodel.py`.
"""

import re

# diffusers name -> original name; the first row that fits the start of a name, up to a dot, wins.
UNET = (
    ('conv_in', 'input_blocks.0.0'),
    ('conv_norm_out', 'out.0'),
    ('conv_out', 'out.2'),
    ('time_embedding.linear_1', 'time_embed.0'),
    ('time_embedding.linear_2', 'time_embed.2'),
    ('time_embedding.cond_proj', 'time_embed.cond_proj'),
    ('add_embedding.linear_1', 'label_emb.0.0'),
    ('add_embedding.linear_2', 'label_emb.0.2'),
    ('mid_block.resnets.0', 'middle_block.0'),
    ('mid_block.attentions.0', 'middle_block.1'),
    ('mid_block.resnets.1', 'middle_block.2'),
)
UNET_RESNET = (
    ('norm1', 'in_layers.0'),
    ('conv1', 'in_layers.2'),
    ('time_emb_proj', 'emb_layers.1'),
    ('norm2', 'out_layers.0'),
    ('conv2', 'out_layers.3'),
    ('conv_shortcut', 'skip_connection'),
)
UNET_BLOCK = re.compile(r'((?:down|up)_blocks)\.(\d+)\.(\w+samplers|resnets|attentions)\.(\d+)')


def unet_modules(names):
    """Names of all modules (or parameters) of a diffusers UNet -> {name: original name}.

    The names must be those of the whole model, since the original ones count its blocks. Raises
    KeyError for a name of no Stable Diffusion UNet.
    """
    names = list(names)
    rows = (*UNET, *_unet_blocks(names))
    return {name: resnet(rename(name, rows)) for name in names}


def rename(name, rows):
    """A name with its start replaced as the first row that fits says. Raises KeyError if none does."""
    for old, new in rows:
        if name == old or name.startswith(old + '.'):
            return new + name[len(old) :]
    raise KeyError(name)


def resnet(name):
    """'input_blocks.1.0.conv1' -> 'input_blocks.1.0.in_layers.2'; other names stay."""
    block, inner = re.fullmatch(r'(\w+_blocks?(?:\.\d+)+\.)?(.*)', name).groups()
    try:
        return block + rename(inner, UNET_RESNET) if block else name
    except KeyError:
        return name


def _unet_blocks(names):
    """Rows for the blocks of the UNet's way down and up."""
    blocks = {m[0] for m in map(UNET_BLOCK.match, names) if m}

    def ordered(kind, part):  # [(level, index)] of e.g. the resnets of the down_blocks
        found = (UNET_BLOCK.match(block).groups() for block in blocks)
        return sorted((int(i), int(j)) for k, i, p, j in found if (k, p) == (kind, part))

    n = 1  # input_blocks.0 is conv_in
    for i, j in ordered('down_blocks', 'resnets'):
        yield f'down_blocks.{i}.resnets.{j}', f'input_blocks.{n}.0'
        yield f'down_blocks.{i}.attentions.{j}', f'input_blocks.{n}.1'
        n += 1
        last = f'down_blocks.{i}.resnets.{j + 1}' not in blocks
        if last and f'down_blocks.{i}.downsamplers.0' in blocks:
            yield f'down_blocks.{i}.downsamplers.0.conv', f'input_blocks.{n}.0.op'
            n += 1
    for n, (i, j) in enumerate(ordered('up_blocks', 'resnets')):
        yield f'up_blocks.{i}.resnets.{j}', f'output_blocks.{n}.0'
        yield f'up_blocks.{i}.attentions.{j}', f'output_blocks.{n}.1'
        if f'up_blocks.{i}.resnets.{j + 1}' not in blocks:
            slot = 2 if f'up_blocks.{i}.attentions.{j}' in blocks else 1
            yield f'up_blocks.{i}.upsamplers.0.conv', f'output_blocks.{n}.{slot}.conv'


VAE = (
    ('conv_norm_out', 'norm_out'),
    ('mid_block.resnets.0', 'mid.block_1'),
    ('mid_block.attentions.0', 'mid.attn_1'),
    ('mid_block.resnets.1', 'mid.block_2'),
)
VAE_INNER = (
    ('conv_shortcut', 'nin_shortcut'),
    ('group_norm', 'norm'),
    ('to_q', 'q'),
    ('to_k', 'k'),
    ('to_v', 'v'),
    ('to_out.0', 'proj_out'),
)
VAE_BLOCK = re.compile(r'(down|up)_blocks\.(\d+)\.(?:(resnets)\.|(?:down|up)samplers\.0\.)')
VAE_ATTENTION = re.compile(r'.*\.attn_1\.(q|k|v|proj_out)\.weight')  # 1x1 convolutions there


def vae_modules(names):
    """Names of all modules (or parameters) of a diffusers AutoencoderKL -> {name: original name}."""
    names = list(names)
    last = max((int(m[2]) for m in map(VAE_BLOCK.search, names) if m), default=0)

    def block(m):  # 'up_blocks.0.resnets.1.' -> 'up.3.block.1.', counted from the finest level
        level = last - int(m[2]) if m[1] == 'up' else int(m[2])
        return f'{m[1]}.{level}.' + ('block.' if m[3] else f'{m[1]}sample.')

    def original(name):
        coder, dot, rest = name.partition('.')
        if coder not in ('encoder', 'decoder'):
            return name  # quant_conv, post_quant_conv
        return coder + dot + _inner(VAE_BLOCK.sub(block, _renamed(rest, VAE)), VAE_INNER)

    return {name: original(name) for name in names}


# https://github.com/mlfoundations/open_clip, `transformer.py`
OPEN_CLIP = (
    ('text_model.embeddings.position_embedding.weight', 'positional_embedding'),
    ('text_model.embeddings.token_embedding', 'token_embedding'),
    ('text_model.final_layer_norm', 'ln_final'),
    ('text_model.encoder.layers', 'transformer.resblocks'),
    ('text_projection.weight', 'text_projection'),
)
OPEN_CLIP_INNER = (
    ('layer_norm1', 'ln_1'),
    ('layer_norm2', 'ln_2'),
    ('self_attn.out_proj', 'attn.out_proj'),
    ('self_attn.q_proj.weight', 'attn.in_proj_weight'),  # three rows of one product
    ('self_attn.k_proj.weight', 'attn.in_proj_weight'),
    ('self_attn.v_proj.weight', 'attn.in_proj_weight'),
    ('self_attn.q_proj.bias', 'attn.in_proj_bias'),
    ('self_attn.k_proj.bias', 'attn.in_proj_bias'),
    ('self_attn.v_proj.bias', 'attn.in_proj_bias'),
    ('mlp.fc1', 'mlp.c_fc'),
    ('mlp.fc2', 'mlp.c_proj'),
)


def open_clip_parameters(names):
    """Parameter names of a transformers CLIP text model, in any order -> {name: OpenCLIP's name}.

    The weights (and the biases) of q, k and v share one name, as there they are one tensor: the result
    has them in the order of its rows.
    """
    rows = sorted(names, key=lambda name: ('.k_proj.' in name) + 2 * ('.v_proj.' in name))
    return {name: _inner(_renamed(name, OPEN_CLIP), OPEN_CLIP_INNER) for name in rows}


def _renamed(name, rows):
    """As `rename`; a name that no row fits stays."""
    try:
        return rename(name, rows)
    except KeyError:
        return name


def _inner(name, rows):
    """A name with the module that a row fits replaced: 'a.1.to_q.bias' -> 'a.1.q.bias'."""
    for old, new in rows:
        start, found, end = name.rpartition('.' + old)
        if found and (not end or end[0] == '.'):
            return f'{start}.{new}{end}'
    return name
