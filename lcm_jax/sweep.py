"""One prompt, drawn over a range of LoRA scales or guidance and of steps: a labelled grid."""

import numpy as np

from lcm_jax import metrics
from lcm_jax.errors import InputError
from lcm_jax.features import open_features
from lcm_jax.grid import grid
from lcm_jax.lora_files.find import term
from lcm_jax.pipeline import Pipeline

SCALES = 0.0, 0.25, 0.5, 0.75, 1.0


def sweep(
    prompts,
    *,
    model='emoji',
    lora=None,
    also=(),
    scales=None,
    guidance=None,
    steps=(1, 2, 4, 8),
    sampler=None,
    seed=0,
    clip='emoji',
):
    """Grid of pictures with the CLIP score below each -> PIL image, lines of a Markdown table.

    A row for each prompt and each of `scales` of `lora`, or, without that, of `guidance`; a column for
    each of `steps`. also: [FILE:SCALE] of LoRAs that are always there. With an acceleration LoRA, at
    whatever scale, the sampler is 'lcm' and guidance 1 unless said otherwise. Raises InputError if nothing
    is to be tried, or both scales and several values of guidance.
    """
    kind, values = tried(lora, scales, guidance)
    pipe = Pipeline.load(model)
    pipe.set_loras([*map(term, also), *([(lora, 1.0)] if kind == 'scale' else [])])
    fast = any(a.accelerates for a in pipe.adapters.values())  # even where its scale is 0
    sampler, first, _ = pipe.manner(sampler, guidance and guidance[0], None, fast)
    network = open_features(clip)
    texts = network.texts(prompts, truncate=True)
    drawn = {}  # (value, steps) -> pictures [N]
    for value in values:
        if kind == 'scale':
            pipe.set_scale(lora, value)
        by = first if kind == 'scale' else value
        for n in steps:
            drawn[value, n] = pipe(prompts, steps=n, guidance=by, sampler=sampler, seed=seed)
    scores = {
        cell: metrics.cosines(network.images(pictures), texts) for cell, pictures in drawn.items()
    }
    said = f'CLIP score by {network.identity}, mean of {len(prompts)} prompts; sampler {sampler}, seed {seed}'
    if kind == 'scale':
        said += f', guidance {first:g}'
    lines = [said, '', *table(kind, values, steps, scores)]
    return shown(prompts, kind, values, steps, drawn, scores), lines


def tried(lora, scales, guidance):
    """-> 'scale' or 'guidance', and the values of it that are tried."""
    if scales and not lora:
        raise InputError('scales of which LoRA? name it (--lora FILE)')
    scales = SCALES if scales is None and lora else scales
    several = guidance is not None and len(guidance) > 1
    if scales and several:
        raise InputError(
            '--lora is there to try its scales; to try several values of --guidance with a LoRA, name '
            'it with --also'
        )
    if not scales and not several:
        raise InputError('nothing to try: give --lora FILE, or several values of --guidance')
    return ('scale', scales) if scales else ('guidance', guidance)


def titles(steps):
    return [f'{n} step{"s" if n > 1 else ""}' for n in steps]


def shown(prompts, kind, values, steps, drawn, scores):
    """(value, steps) -> pictures and scores [N] -> the labelled grid."""
    rows = [(i, value) for i in range(len(prompts)) for value in values]
    return grid(
        [f'{prompts[i]}\n{kind} {value:g}' for i, value in rows],
        titles(steps),
        [[drawn[value, n][i] for n in steps] for i, value in rows],
        notes=[[f'{scores[value, n][i]:.1f}' for n in steps] for i, value in rows],
    )


def table(kind, values, steps, scores):
    """(value, steps) -> scores [N] -> lines of Markdown, means over the prompts."""
    lines = [f'| | {" | ".join(titles(steps))} |', '|---' * (len(steps) + 1) + '|']
    for value in values:
        means = ' | '.join(f'{np.mean(scores[value, n]):.1f}' for n in steps)
        lines.append(f'| {kind} {value:g} | {means} |')
    return lines
