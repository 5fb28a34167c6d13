"""What a LoRA file says of itself beside its tensors: peft's config, kohya's ss_network entries."""

import json
import math
import re
from pathlib import Path

from lcm_jax.errors import InputError
from lcm_jax.tensors import read_json

KEY = 'lora_adapter_metadata'  # diffusers' key of the adapter's peft config, as JSON
BESIDE = 'adapter_config.json'  # the same of a file that peft itself saved
# Values of init_lora_weights with which training changed the base weights too.
BASE_CHANGING = 'pissa', 'olora', 'corda', 'loftq', 'lora_ga'


def load(metadata, file):
    """A LoRA file's metadata and place -> its peft config, {} if it has none. InputError if bad."""
    beside = Path(file).with_name(BESIDE)
    config = {}
    if KEY in metadata:
        try:
            config = json.loads(metadata[KEY])
        except ValueError as e:
            raise InputError(f'{file}: {KEY} is not a peft config in JSON: {e}') from e
    elif Path(file).stem == 'adapter_model' and beside.is_file():
        config = read_json(beside)
    if not isinstance(config, dict):
        raise InputError(f'{file}: its peft config is a {type(config).__name__}, not an object')
    return config


def options(config, component, source):
    """The options of one component in a peft config. Raises InputError, naming `source`, if bad."""
    own = {
        key.removeprefix(f'{component}.'): value
        for key, value in config.items()
        if '.' not in key or key.startswith(f'{component}.')
    }
    patterns = own.setdefault('alpha_pattern', {}) or {}
    alphas = [
        own.get('lora_alpha') or 1,
        *(patterns.values() if isinstance(patterns, dict) else '?'),
    ]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in alphas):
        raise InputError(
            f'{source}: lora_alpha in its peft config is not a finite number: {alphas}'
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise InputError(f'{source}: alpha_pattern {pattern!r} in its peft config: {e}') from e
    init = str(own.get('init_lora_weights')).lower()
    method = 'DoRA' if own.get('use_dora') else init if init.startswith(BASE_CHANGING) else ''
    if method:
        raise InputError(
            f'{source}: {method} in its peft config is not supported; nothing was loaded'
        )
    return own


def scale(alpha, rank, options, module):
    """The factor of up @ down: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732).

    alpha: from a tensor, or None: then from the options, else r. rank None: no scale is meant.
    """
    if rank is None:
        return 1.0
    if alpha is None:
        alpha = options.get('lora_alpha') or rank
        for pattern, value in (options.get('alpha_pattern') or {}).items():
            if re.match(rf'(.*\.)?({pattern})$', module):
                alpha = value
                break
    return alpha / (math.sqrt(rank) if options.get('use_rslora') else rank)


def metadata(dialect, ranks, alpha):
    """{(component, module): rank} and alpha -> what the dialect's readers look for."""
    rank = max(ranks.values())
    if dialect != 'peft':
        return {
            'ss_network_module': 'networks.lora',
            'ss_network_dim': str(rank),
            'ss_network_alpha': str(alpha),
        }
    config = {}
    for component in sorted({component for component, _ in ranks}):
        # Without text_model., which not every version of transformers has; peft compares ends.
        own = {m.removeprefix('text_model.'): r for (c, m), r in ranks.items() if c == component}
        config |= {
            f'{component}.r': rank,
            f'{component}.lora_alpha': alpha,
            f'{component}.target_modules': sorted(own),
            f'{component}.rank_pattern': {module: r for module, r in own.items() if r != rank},
        }
    return {KEY: json.dumps(config)}
