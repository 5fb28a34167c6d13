"""Which base model a LoRA file is for, guessed from its names and shapes alone."""

import re

from lcm_jax.lora_files import dialects

# Width of the text that attn2 reads -> model; SDXL and SSD-1B share theirs.
CONTEXT = {768: 'SD 1.x', 1024: 'SD 2.x', 2048: 'SDXL'}
# Transformers, in the names of diffusers and of sgm, whose blocks 4 to 9 SSD-1B lacks.
DEEP = (
    r'(down_blocks_2_attentions_[01]|input_blocks_[78]_1|up_blocks_0_attentions_[01]|'
    r'output_blocks_[01]_1)_transformer_blocks_'
)
SHARED = re.compile(  # the one transformer of both that has blocks 4 to 9
    r'(up_blocks_0_attentions_2|output_blocks_2_1)_transformer_blocks_[4-9]_'
)
SDXL_ONLY = re.compile(rf'(mid_block_attentions|middle_block_1)_|{DEEP}[4-9]_')


def family(tensors):
    """{key: array} -> 'SD 1.x', 'SD 2.x', 'SDXL', 'SSD-1B', 'SDXL or SSD-1B' or 'unknown'."""
    context, names = set(), set()
    for key, x in tensors.items():
        part = next(dialects.parts(key), None)
        if part is None or part.component != 'unet':
            continue
        name = part.name.replace('.', '_')
        names.add(f'{name}_')
        reads = part.role in ('down', 'hada_w1_b') and x.ndim > 1
        if reads and re.search(r'attn2_(processor_)?to_[kv]$', name):
            context.add(x.shape[1])
    if not context and any('transformer_blocks_1_' in name for name in names):
        context = {2048}  # a second block in a transformer is SDXL's and its kin's alone
    base = CONTEXT.get(context.pop(), 'unknown') if len(context) == 1 else 'unknown'
    if base == 'SDXL' and not any(map(SDXL_ONLY.match, names)):
        whole = all(any(re.match(part, name) for name in names) for part in (DEEP, SHARED))
        return 'SSD-1B' if whole else 'SDXL or SSD-1B'
    return base
