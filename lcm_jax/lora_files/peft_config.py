"""What a LoRA file says of itself beside its tensors: peft's config, kohya's ss_network entries."""

import json
import math
import re

from lcm_jax import weights
from lcm_jax.errors import InputError

KEY = 'lora_adapter_metadata'  # diffusers' key of the adapter's peft config, as JSON
BESIDE = 'adapter_config.json'  # the same of a file that peft itself saved
# Values of init_lora_weights with which training changed the base weights too.
BASE_CHANGING = 'pissa', 'olora', 'corda', 'loftq', 'lora_ga'


def read(metadata, file, component, source):
    """The peft options of one component, {} if there are none. Raises InputError naming `source`."""
    config, where = _load(metadata, file, source)
    options = {
        key.removeprefix(f'{component}.'): value
        for key, value in config.items()
        if '.' not in key or key.startswith(f'{component}.')
    }
    numbers = [options.get('lora_alpha') or 1, *(options.get('alpha_pattern') or {}).values()]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise InputError(f'{source}: alpha in its {where} is not a finite number: {numbers}')
    init = str(options.get('init_lora_weights')).lower()
    if options.get('use_dora') or init.startswith(BASE_CHANGING):
        method = 'DoRA' if options.get('use_dora') else init
        raise InputError(f'{source}: {method} in its {where} is not supported; nothing was loaded')
    return options


def _load(metadata, file, source):
    """The whole peft config of a file, and where it was found."""
    if KEY in metadata:
        try:
            config, where = json.loads(metadata[KEY]), KEY
        except ValueError as e:
            raise InputError(f'{source}: {KEY} is not a peft config in JSON: {e}') from e
    elif file.stem == 'adapter_model' and file.with_name(BESIDE).is_file():
        config, where = weights.read_json(file.with_name(BESIDE)), BESIDE
    else:
        config, where = {}, ''
    patterns = [v for k, v in config.items() if k.endswith('alpha_pattern')] if config else []
    if not isinstance(config, dict) or not all(isinstance(v or {}, dict) for v in patterns):
        raise InputError(f'{source}: {where} is not a peft config')
    return config, where


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
