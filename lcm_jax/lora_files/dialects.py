"""The dialects of LoRA files: how programs spell a module's name and its tensors. Rows of data.

A key is prefix + name + leaf. The prefix says the component, the name the module, the leaf the
tensor's role. Modules are called as in diffusers, with dots; each dialect spells that in its way.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from lcm_jax.original import unet_modules

COMPONENTS = ('unet', 'text_encoder', 'text_encoder_2')


class Dialect(NamedTuple):
    """One way to write keys."""

    prefixes: dict[str, tuple[str, ...]]  # component -> prefixes; written: SDXL the last, else [0]
    spell: Callable  # (component, all modules of it) -> {name: module}
    words: tuple[str, ...]  # what a name in the UNet starts with
    leaves: dict[str, str]  # leaf -> role; written: the first leaf of a role


def _dotted(component, modules):
    return {module: module for module in modules}


def _underscored(component, modules):
    return {module.replace('.', '_'): module for module in modules}


def _original(component, modules):
    names = unet_modules(modules) if component == 'unet' else _dotted(component, modules)
    return {name.replace('.', '_'): module for module, name in names.items()}


def _processors(component, modules):
    """attn1.to_out.0 -> attn1.processor.to_out, self_attn.q_proj -> self_attn.to_q."""
    unet = re.compile(r'\.(attn\d)\.(to_[a-z]+)(\.0)?$'), r'.\1.processor.\2'
    text = re.compile(r'\.self_attn\.([a-z]+)_proj$'), r'.self_attn.to_\1'
    pattern, new = unet if component == 'unet' else text
    return {pattern.sub(new, module): module for module in modules}


DOTS = {component: (f'{component}.',) for component in COMPONENTS}
BARE = {**DOTS, 'unet': ('unet.', '')}
RAW = {
    'unet': ('base_model.model.', 'unet.base_model.model.', ''),
    'text_encoder': ('base_model.model.', 'text_encoder.base_model.model.', ''),
    'text_encoder_2': ('text_encoder_2.base_model.model.',),
}
KOHYA = {
    'unet': ('lora_unet_',),
    'text_encoder': ('lora_te_', 'lora_te1_'),
    'text_encoder_2': ('lora_te2_',),
}
LYCORIS = (
    *('lokr_w1', 'lokr_w1_a', 'lokr_w1_b', 'lokr_w2', 'lokr_w2_a', 'lokr_w2_b', 'lokr_t2'),
    *('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b', 'hada_t1', 'hada_t2'),
)
KOHYA_LEAVES = {
    '.lora_down.weight': 'down',
    '.lora_up.weight': 'up',
    '.lora_mid.weight': 'mid',
    '.alpha': 'alpha',
    **{f'.{role}': role for role in LYCORIS},
}
PEFT_LEAVES = {
    '.lora_A.weight': 'down',
    '.lora_B.weight': 'up',
    '.lora_A.default.weight': 'down',
    '.lora_B.default.weight': 'up',
    '.alpha': 'alpha',
}
MIDDLE_LEAVES = {
    '.lora.down.weight': 'down',
    '.lora.up.weight': 'up',
    '.lora_linear_layer.down.weight': 'down',
    '.lora_linear_layer.up.weight': 'up',
}
OLD_LEAVES = {'_lora.down.weight': 'down', '_lora.up.weight': 'up'}

# What a module's name starts with.
UNET = (
    *('down_blocks', 'mid_block', 'up_blocks', 'conv_in', 'conv_out'),
    *('time_embedding', 'add_embedding'),
)
ORIGINAL = 'input_blocks', 'middle_block', 'output_blocks', 'out', 'time_embed', 'label_emb'
TEXT = 'text_model', 'encoder', 'text_projection'

DIALECTS = {
    'kohya': Dialect(KOHYA, _underscored, UNET, KOHYA_LEAVES),
    'kohya-sgm': Dialect(KOHYA, _original, ORIGINAL, KOHYA_LEAVES),
    'peft': Dialect(DOTS, _dotted, UNET, PEFT_LEAVES),
    'peft-raw': Dialect(RAW, _dotted, UNET, PEFT_LEAVES),
    'diffusers': Dialect(BARE, _dotted, UNET, MIDDLE_LEAVES),
    'diffusers-old': Dialect(BARE, _processors, UNET, OLD_LEAVES),
}
WRITTEN = {  # dialect -> the roles that are tensors of the file; peft's alpha is in its metadata
    'kohya': ('down', 'up', 'alpha'),
    'kohya-sgm': ('down', 'up', 'alpha'),
    'peft': ('down', 'up'),
}

# Regex of a part of a key -> what is no row above: its update is another function, or there is none.
OTHERS = {
    'dora_scale|lora_magnitude_vector': 'DoRA',
    r'lora_B\.bias': 'LoRA with biases',
    'hada_': 'LoHa',
    'lokr_': 'LoKr',
    'boft_': 'BOFT',
    'oft_': 'OFT',
    'ia3_|on_input': 'IA3',
    r'\.a1\.weight': 'GLoRA',
    r'\.diff(_b)?$': 'full differences',
    '[wb]_norm': 'norms of LyCORIS',
    r'^(bundle_emb\.|emb_params$|clip_[lg]$)': 'textual inversion',
    r'^(model\.diffusion_model|first_stage_model)\.': 'a whole model',
}


class Part(NamedTuple):
    """A key taken apart."""

    dialect: str
    component: str
    name: str
    stem: str  # prefix + name
    role: str


def parts(key):
    """A file's key -> its possible Parts, most likely first; none if no dialect has such keys."""
    for dialect, row in DIALECTS.items():
        leaf = next((leaf for leaf in row.leaves if key.endswith(leaf)), None)
        if leaf is None:
            continue
        stem = key[: -len(leaf)]
        for component, prefixes in row.prefixes.items():
            words = row.words if component == 'unet' else TEXT
            for prefix in prefixes:
                name = stem.removeprefix(prefix)
                if stem.startswith(prefix) and re.match(f'({"|".join(words)})([._]|$)', name):
                    yield Part(dialect, component, name, stem, row.leaves[leaf])


def names(dialect, component, modules):
    """All modules of a component -> {name in a file: module}, with every accepted spelling.

    Text encoders are written with or without `text_model.`, after the version of transformers.
    """
    out = DIALECTS[dialect].spell(component, modules)
    if component != 'unet':
        out |= {re.sub('^text_model[._]', '', name): module for name, module in out.items()}
    return out


def key(dialect, component, name, role, sdxl):
    """The key to write for a module's role."""
    row = DIALECTS[dialect]
    leaf = next(leaf for leaf, r in row.leaves.items() if r == role)
    return row.prefixes[component][-1 if sdxl else 0] + name + leaf


def is_sdxl(models):
    """{component: parameters} -> whether the model takes sizes and pooled text, as SDXL does."""
    return 'text_encoder_2' in models or any(
        path.startswith('add_embedding') for path in models.get('unet', ())
    )
