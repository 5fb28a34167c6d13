"""What an evaluation's config asks for: a cell for each way of drawing, guidance and number of steps."""

import dataclasses
import itertools
import re

import numpy as np

from lcm_jax.errors import InputError, choose
from lcm_jax.lora_files.find import find, term
from lcm_jax.model import describe
from lcm_jax.samplers import SAMPLERS


@dataclasses.dataclass(frozen=True)
class Cell:
    """A way of drawing; a row of a config's `ways` is one of which guidance and steps may be several."""

    label: str
    sampler: str
    model: str = ''  # '': the config's
    lora: str = ''  # FILE:SCALE + FILE:SCALE ...; a file, or the name of a shipped LoRA
    guidance: float | tuple = 1.0
    steps: int | tuple = ()  # (): the config's
    spacing: str = ''  # of the times, a key of samplers.SPACINGS; '': the sampler's own

    @property
    def name(self):
        return f'{self.label}, {self.steps} step{"s" if self.steps > 1 else ""}'


def cells_of(row, config):
    """A row of the config -> Cells of one guidance and number of steps each.

    Raises InputError for an unknown key, sampler or LoRA.
    """
    fields = {f.name: f for f in dataclasses.fields(Cell)}
    for key in row:
        choose(f'key of ways ({row.get("label", "no label")})', key, fields)
    missing = [k for k in ('label', 'sampler') if not row.get(k)]
    if missing:
        raise InputError(f'a row of ways lacks {", ".join(missing)}: {dict(row)}')
    way = Cell(**row)
    choose('sampler', way.sampler, SAMPLERS)
    for file, _ in terms(way.lora):
        find(file)
    several = np.size(way.guidance) > 1
    for guidance, steps in itertools.product(
        np.atleast_1d(way.guidance).tolist(), np.atleast_1d(way.steps or config.steps).tolist()
    ):
        label = f'{way.label}, guidance {guidance:g}' if several else way.label
        yield dataclasses.replace(
            way, label=label, model=way.model or config.model, guidance=guidance, steps=steps
        )


def terms(lora):
    """'FILE:SCALE + FILE:SCALE' -> [(file, scale)]; a scale that is not given is 1. Files may have a '+'."""
    return [term(text) for text in re.split(r'\s+\+\s+', lora.strip()) if text]


def planned(config):
    """-> Cells, the reference's first, and that or None; InputError if they cannot all be drawn."""
    if not config.sets:
        raise InputError('sets is empty: rows of name, source and number of pictures are needed')
    if config.batch < 1:
        raise InputError(f'batch = {config.batch}: must be at least 1')
    alone('sets', [name for name, *_ in config.sets])
    cells = [cell for way in config.ways for cell in cells_of(way, config)]
    alone('ways', [cell.name for cell in cells])
    reference = None
    if config.reference:
        choose('reference', config.reference, {cell.label: cell for cell in cells})
        reference, *more = [cell for cell in cells if cell.label == config.reference]
        if more:
            raise InputError(f'reference {config.reference!r} has several numbers of steps')
    cells.sort(key=lambda cell: cell != reference)
    for name in dict.fromkeys(cell.model for cell in cells):
        model = describe(name)
        height, width = model.size
        if not height == width == config.resolution:
            raise InputError(
                f'resolution = {config.resolution} px of the real pictures, but {name} draws '
                f'{height} x {width} px: set resolution to what all models draw'
            )
        for cell in cells:
            if cell.model == name:
                check_times(cell, model.schedule)
    return cells, reference


def check_times(cell, schedule):
    """InputError if the model's noise schedule has no times for that many steps of the sampler."""
    try:
        schedule.times(cell.sampler, cell.steps, cell.spacing or None)
    except InputError as e:
        raise InputError(f'ways ({cell.label}): {e}') from e


def alone(key, names):
    """InputError if two names would be one file's."""
    slugs = [slug(name) for name in names]
    twice = [name for name in names if slugs.count(slug(name)) > 1]
    if twice:
        raise InputError(f'two {key} would be called {twice[-1]!r}; give each a name of its own')


def slug(text):
    return re.sub(r'[^a-z0-9.+]+', '-', text.lower()).strip('-')
