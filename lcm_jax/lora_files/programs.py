"""Which modules of a LoRA file other programs load: the rules by which they name modules.

Each rule says under which stems (a key less its leaf) a program looks for the modules; a module
whose tensors lie under another stem is dropped, in most programs with no more than a log line.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from lcm_jax.lora_files import dialects
from lcm_jax.original import resnet, unet_modules


def _flat(name):
    return name.replace('.', '_')


def _is_sdxl(spots):
    return 'text_encoder_2' in spots or any(m.startswith('add_embedding') for m in spots['unet'])


def diffusers(component, spots):
    """diffusers 0.42, loaders/lora_pipeline.py and lora_conversion_utils.py; as it was seen to do.

    The pipeline of SD 1 and 2 does not know the original names. In kohya's it takes the underscores of
    add_embedding and cond_proj for dots.
    """
    for dialect in ('kohya', 'peft', 'diffusers', 'diffusers-old', 'kohya-sgm'):
        if dialect != 'kohya-sgm' or _is_sdxl(spots):
            for name, module in dialects.names(dialect, component, spots[component]).items():
                if dialect == 'kohya' and re.search('add_embedding|cond_proj', module):
                    continue
                for prefix in filter(None, dialects.DIALECTS[dialect].prefixes[component]):
                    yield prefix + name, module


def comfyui(component, spots):
    """comfy/lora.py (model_lora_keys_unet, model_lora_keys_clip) and utils.unet_to_diffusers."""
    if component == 'unet':
        for module, original in unet_modules(spots['unet']).items():
            yield f'lora_unet_{_flat(original)}', module
            if not module.endswith('cond_proj'):  # which its table of diffusers names lacks
                dotted = module.replace('.to_', '.processor.to_')
                dotted = re.sub(r'to_out\.0$', 'to_out', dotted)
                yield f'lora_unet_{_flat(module)}', module
                yield dotted, module
                yield f'unet.{dotted}', module
        return
    prefixes = ('lora_te2_',) if component == 'text_encoder_2' else ('lora_te_', 'lora_te1_')
    for module in spots[component]:
        yield from ((prefix + _flat(module), module) for prefix in prefixes)
        if module != 'text_projection':
            yield f'{component}.{module}', module


def a1111(component, spots):
    """extensions-builtin/Lora/networks.py, convert_diffusers_name_to_compvis and load_network."""
    if component == 'unet':
        for module, original in unet_modules(spots['unet']).items():
            yield f'lora_unet_{_flat(original)}', module
            if _counted(module) == original:
                yield f'lora_unet_{_flat(module)}', module
        return
    context = next((s[1] for m, (*_, s) in spots['unet'].items() if m.endswith('attn2.to_k')), 0)
    if component == 'text_encoder_2':
        prefixes = ('lora_te2_',)
    elif _is_sdxl(spots):
        prefixes = ('lora_te1_',)
    else:  # SD 2's OpenCLIP is found under one name alone
        prefixes = ('lora_te_',) if context == 1024 else ('lora_te_', 'lora_te1_')
    for module in spots[component]:
        if module.startswith('text_model.encoder'):
            yield from ((prefix + _flat(module), module) for prefix in prefixes)


A1111_BLOCKS = (  # (diffusers, the original block as A1111 counts, with two resnets a level)
    (r'conv_in', lambda: 'input_blocks.0.0'),
    (r'conv_out', lambda: 'out.2'),
    (r'time_embedding\.linear_(\d)', lambda i: f'time_embed.{2 * i - 2}'),
    (r'down_blocks\.(\d+)\.attentions\.(\d+)', lambda i, j: f'input_blocks.{1 + 3 * i + j}.1'),
    (r'down_blocks\.(\d+)\.resnets\.(\d+)', lambda i, j: f'input_blocks.{1 + 3 * i + j}.0'),
    (r'down_blocks\.(\d+)\.downsamplers\.0\.conv', lambda i: f'input_blocks.{3 + 3 * i}.0.op'),
    (r'mid_block\.attentions\.(\d+)', lambda i: 'middle_block.1'),
    (r'mid_block\.resnets\.(\d+)', lambda i: f'middle_block.{2 * i}'),
    (r'up_blocks\.(\d+)\.attentions\.(\d+)', lambda i, j: f'output_blocks.{3 * i + j}.1'),
    (r'up_blocks\.(\d+)\.resnets\.(\d+)', lambda i, j: f'output_blocks.{3 * i + j}.0'),
    (
        r'up_blocks\.(\d+)\.upsamplers\.0\.conv',
        lambda i: f'output_blocks.{2 + 3 * i}.{2 if i else 1}.conv',
    ),
)


def _counted(module):
    """The original name that A1111 computes for a module of the UNet; None if it has no rule."""
    for pattern, name in A1111_BLOCKS:
        match = re.match(pattern, module)
        if match:
            return resnet(name(*map(int, match.groups())) + module[match.end() :])
    return None


HIDES = {'peft': ('diffusers', 'diffusers-old'), 'kohya': ('kohya-sgm',)}  # in diffusers


def left_by_diffusers(found):
    """`files.locate`'s result -> the modules (component, module) that diffusers leaves, rightly named or not.

    Those with a tensor that it does not know; of kohya's names, nothing is loaded if there is one. And
    in the UNet's keys some dialects hide others.
    """
    dialects_of = {
        key: {part.dialect for part, _ in roles.values()} for key, roles in found.items()
    }
    strange = {key for key, roles in found.items() if not roles.keys() <= {'down', 'up', 'alpha'}}
    if any(dialects_of[key] & {'kohya', 'kohya-sgm'} for key in strange):
        return {*found}
    unet = [key for key in found if key[0] == 'unet']
    there = set().union(*(dialects_of[key] for key in unet))
    hidden = {other for dialect in there for other in HIDES.get(dialect, ())}
    return strange | {key for key in unet if dialects_of[key] & hidden}


class Program(NamedTuple):
    """How a program reads a LoRA file."""

    rule: Callable  # (component, {component: modules}) -> pairs of a stem and its module
    left: Callable = lambda found: set()  # `files.locate`'s result -> what it leaves besides


PROGRAMS = {
    'diffusers': Program(diffusers, left_by_diffusers),
    'comfyui': Program(comfyui),
    'a1111': Program(a1111),
}


def dropped(program, found, spots):
    """A program's name, `files.locate`'s result, the model's modules -> what the program drops."""
    rule, left = PROGRAMS[program]
    loads = {(part, *pair) for part in spots for pair in rule(part, spots)}
    left = left(found)

    def loaded(component, module, roles):
        return (component, module) not in left and all(
            (component, part.stem, module) in loads for part, _ in roles.values()
        )

    return [f'{c} {module}' for (c, module), roles in found.items() if not loaded(c, module, roles)]
