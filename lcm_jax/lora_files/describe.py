"""What is in a LoRA file, told from its keys and tensors alone, without the model."""

import re
from collections import Counter, defaultdict

import numpy as np

from lcm_jax.errors import InputError
from lcm_jax.lora_files import algebra, dialects, methods, peft_config
from lcm_jax.lora_files.family import family
from lcm_jax.tensors import open_tensors

LONG = 100  # letters of a value of the metadata that are shown
# A module's name in any dialect -> its block.
BLOCK = re.compile(
    r'(?:down|up|input|output)_blocks[._]\d+|mid_block|middle_block|[a-z_]*layers[._]\d+'
)


def inspect_lora(file):
    """A LoRA file -> text: dialects, base model, method, rank, alpha, modules, norms, metadata.

    The norm of a block is that of all its updates together (Frobenius), alpha / r included. Raises
    InputError if no dialect explains any key.
    """
    tensors, metadata = open_tensors(file)
    found, strange = survey(tensors)
    if not found:
        raise InputError(
            f'{file}: {len(tensors)} tensors are no LoRA factors in a known dialect '
            f'({", ".join(dialects.DIALECTS)}); the first keys are {", ".join([*tensors][:3])}'
        )
    config = peft_config.load(metadata, file)
    options = {part: peft_config.options(config, part, file) for part in dialects.COMPONENTS}
    arrays = {
        spot: {role: tensors[key] for role, (_, key) in roles.items()}
        for spot, roles in found.items()
    }
    norms, broken = block_norms(arrays, options)
    stems = [f'{next(iter(found[spot].values()))[0].stem} {why}' for spot, why in broken.items()]
    rows = {
        'file': file,
        'dialect': ', '.join(Counter(p.dialect for r in found.values() for p, _ in r.values())),
        'base': family(tensors),
        **_summary(arrays, options),
        'broken': f'{len(stems)}: {", ".join(stems[:3])}' if stems else '',
        'unexplained': f'{len(strange)} tensors: {", ".join(strange[:3])}' if strange else '',
        'metadata': f'{len(metadata)} entries',
    }
    lines = [f'{key:<12}{value}' for key, value in rows.items() if value]
    for key, value in sorted(metadata.items()):
        rest = ' ...' if len(value) > LONG else ''
        lines.append(f'  {key}: {value[:LONG]}{rest}')
    lines += ['norm of the update'] + [f'  {block:<28}{n:10.4g}' for block, n in norms.items()]
    return '\n'.join(lines)


def _summary(arrays, options):
    """Rows of `inspect_lora` that are told from the tensors of the modules."""
    counts = Counter(component for component, _ in arrays)
    factors = [x for a in arrays.values() for role, x in a.items() if role != 'alpha']
    alphas = [
        np.asarray(a['alpha']).item()
        for a in arrays.values()
        if methods.ranked(a) and 'alpha' in a and a['alpha'].size == 1
    ]
    said = [o['lora_alpha'] for o in options.values() if o.get('lora_alpha')]
    return {
        'method': ', '.join(sorted({methods.name(a.keys() - {'alpha'}) for a in arrays.values()})),
        'modules': ', '.join(f'{counts[c]} {c}' for c in dialects.COMPONENTS if c in counts),
        'rank': _listed(filter(None, map(_rank, arrays.values()))),
        'alpha': _listed(alphas) or _listed(said) or 'not in the file; taken as the rank',
        'parameters': f'{sum(x.size for x in factors):,}',
        'dtype': ', '.join(sorted({str(x.dtype) for x in factors})),
    }


def _rank(tensors):
    """{role: array} of a module -> its rank; 0 if it has none."""
    role = next((r for r in methods.RANK if r in tensors and tensors[r].ndim), None)
    return tensors[role].shape[0] if role else 0


def survey(tensors):
    """{key: array} -> {(component, name): {role: (Part, key)}}, keys that no dialect explains.

    Keys that several dialects explain are given to the one that explains most.
    """
    left = {key: list(dialects.parts(key)) for key in tensors}
    strange = sorted(key for key, parts in left.items() if not parts)
    found = defaultdict(dict)
    while left := {key: parts for key, parts in left.items() if parts}:
        votes = Counter(
            dialect for parts in left.values() for dialect in {p.dialect for p in parts}
        )
        best = max(votes, key=votes.get)
        for key, parts in left.items():
            part = next((p for p in parts if p.dialect == best), None)
            if part:
                found[part.component, part.name][part.role] = part, key
                left[key] = []
    return dict(found), strange


def block_norms(arrays, options):
    """{(component, name): {role: array}} and peft options -> ({'component block': norm}, broken).

    broken: {(component, name): why} of the modules whose tensors make no update.
    """
    squares, broken = Counter(), {}
    for (component, name), tensors in arrays.items():
        try:
            up, down = methods.update(tensors, options[component], name)
        except methods.Misfit as e:
            broken[component, name] = e.args[1] or e.args[0]
            continue
        block = BLOCK.search(name)
        block = block[0].replace('layers_', 'layers.') if block else name
        squares[f'{component} {block}'] += algebra.norm({'down': down.T, 'up': up.T}) ** 2
    order = sorted(
        squares, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r'(\d+)', name)]
    )
    return {name: squares[name] ** 0.5 for name in order}, broken


def _listed(numbers):
    """Numbers -> their distinct values as text, such as '16' or '4, 8, 12, ... (9 values)'."""
    values = sorted(set(numbers))
    text = ', '.join(f'{v:g}' for v in values[:3])
    return text if len(values) <= 3 else f'{text}, ... ({len(values)} values)'
