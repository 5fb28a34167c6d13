"""One prompt, drawn over a range of LoRA scales or guidance and of steps: a labelled grid."""

import numpy as np

from lcm_jax import metrics
from lcm_jax.adapters import term
from lcm_jax.errors import InputError
from lcm_jax.features import open_features
from lcm_jax.grid import grid, pixels
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
    each of `steps`. also: [FILE:SCALE] of LoRAs that are always there. Raises InputError if nothing is to
    be tried, or both scales and several values of guidance.
    """
    if scales is None and lora:
        scales = SCALES
    if scales and not lora:
        raise InputError('scales of which LoRA? name it (--lora FILE)')
    if bool(scales) == (guidance is not None and len(guidance) > 1):
        raise InputError(
            'try the scales of a LoRA (--lora FILE --scales ...) or several values of guidance '
            '(--guidance ...), not both'
        )
    pipe = Pipeline.load(model)
    for text in also:
        file, scale = term(text)
        pipe.add_lora(file, scale=scale)
    if scales:
        pipe.add_lora(lora, name='swept' if 'lcm' not in str(lora).lower() else 'swept-lcm')
    swept = next((name for name in pipe.adapters if name.startswith('swept')), None)
    network = open_features(clip)
    texts = network.texts(list(prompts))
    values = scales or guidance
    rows, cells, notes = [], [], []
    lines = [
        '| | ' + ' | '.join(f'{n} steps' for n in steps) + ' |',
        '|---' * (len(steps) + 1) + '|',
    ]
    for value in values:
        if swept:
            pipe.set_scale(swept, value)
        strength = (guidance or [None])[0] if scales else value
        drawn = [
            pipe(list(prompts), sampler=sampler, steps=n, guidance=strength, seed=seed)
            for n in steps
        ]
        scores = [metrics.cosines(network.images(pixels(x)), texts) for x in drawn]
        name = f'scale {value:g}' if scales else f'guidance {value:g}'
        for i, prompt in enumerate(prompts):
            rows.append(f'{prompt}\n{name}')
            cells.append([x[i] for x in drawn])
            notes.append([f'{s[i]:.1f}' for s in scores])
        means = [f'{np.mean(s):.1f}' for s in scores]
        lines.append(f'| {name} | ' + ' | '.join(means) + ' |')
    order = np.argsort(
        [j % len(prompts) for j in range(len(rows))], kind='stable'
    )  # prompt by prompt
    rows, cells, notes = ([x[j] for j in order] for x in (rows, cells, notes))
    return grid(rows, [f'{n} steps' for n in steps], cells, notes=notes), lines
