"""Measure ways of drawing: models x LoRAs x samplers x guidance x steps.

    python -m lcm_jax.evaluate --config=configs/eval_NAME.py --workdir=DIR [--config.KEY=VALUE ...]

KEY is one of configs/eval.py. DIR is for results.json, report.md, plots, grids, and a file for each cell
that is measured: the same command again goes on where it was stopped. Several processes, started as for
training, share the drawing.
"""

import dataclasses
import itertools
import json
import os
import re
import sys
import time
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from lcm_jax import judge, report, sharding
from lcm_jax.adapters import find, term
from lcm_jax.checkpoint import open_model
from lcm_jax.data.pairs import pairs, picked
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError, choose
from lcm_jax.features import open_features, open_lpips
from lcm_jax.flags import parse
from lcm_jax.grid import pixels
from lcm_jax.logs import say
from lcm_jax.measure import statistics_of
from lcm_jax.peers import Peers
from lcm_jax.pipeline import Pipeline
from lcm_jax.samplers import SAMPLERS
from lcm_jax.tree import digest

MADE_OF = 'made_of'  # in files: all that they depend on


@dataclasses.dataclass(frozen=True)
class Way:
    """A row of a config's `ways`; guidance and steps: a number or several."""

    label: str
    sampler: str
    model: str = ''  # '': the config's
    lora: str = ''  # FILE:SCALE + FILE:SCALE ...; a file, or the name of a shipped LoRA
    guidance: float | tuple = 1.0
    steps: int | tuple = ()  # (): the config's


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way of drawing, with one guidance and number of steps."""

    label: str
    model: str
    lora: str
    sampler: str
    guidance: float
    steps: int

    @property
    def name(self):
        return f'{self.label}, {self.steps} step{"s" if self.steps > 1 else ""}'


def cells_of(way, config):
    """A row of the config -> its Cells. InputError for an unknown key, sampler or LoRA."""
    fields = {f.name: f for f in dataclasses.fields(Way)}
    for key in way:
        choose(f'key of ways ({way.get("label", "no label")})', key, fields)
    missing = [k for k in ('label', 'sampler') if not way.get(k)]
    if missing:
        raise InputError(f'a row of ways lacks {", ".join(missing)}: {dict(way)}')
    way = Way(**way)
    choose('sampler', way.sampler, SAMPLERS)
    for file, _ in terms(way.lora):
        find(file)
    several = np.size(way.guidance) > 1
    for guidance, steps in itertools.product(
        np.atleast_1d(way.guidance).tolist(), np.atleast_1d(way.steps or config.steps).tolist()
    ):
        if steps < 1:
            raise InputError(f'ways ({way.label}): steps = {steps}: must be at least 1')
        label = f'{way.label}, guidance {guidance:g}' if several else way.label
        yield Cell(label, way.model or config.model, way.lora, way.sampler, guidance, int(steps))


def terms(lora):
    """'FILE:SCALE + FILE:SCALE' -> [(file, scale)]; a scale that is not given is 1. Files may have a '+'."""
    return [term(text) for text in re.split(r'\s+\+\s+', lora.strip()) if text]


class Artist:
    """Draws cells, holding one model at a time, on all devices of this process."""

    def __init__(self, config):
        self.config, self.pipe, self.set_to, self.known = config, None, None, {}
        devices = jax.local_devices()
        self.mesh = Mesh(np.array(devices), ('data',)) if len(devices) > 1 else None

    def set(self, cell):
        """Load the cell's model and LoRAs -> Pipeline."""
        if self.set_to is None or self.set_to[0] != cell.model:
            self.pipe = None  # one model in memory
            self.pipe = Pipeline.load(cell.model, self.config.dtype or None, mesh=self.mesh)
            self.set_to = cell.model, ''
        if self.set_to[1] != cell.lora:
            self.pipe.set_loras(terms(cell.lora))
            self.set_to = cell.model, cell.lora
        return self.pipe

    def drawn_with(self, cell):
        """-> {'weights': hash of the parameters, 'settings': of what the model's files say besides}."""
        key = cell.model, cell.lora
        if key not in self.known:
            pipe = self.set(cell)
            said = pipe.schedule._replace(abar=np.asarray(pipe.schedule.abar).tolist())
            self.known[key] = {
                'weights': digest(pipe.merged),
                'settings': digest({}, said, repr(pipe.specs), pipe.size),
            }
        return self.known[key]

    def made_of(self, cell):
        """All that a picture depends on besides its prompt, its number, the tokenizers and the code."""
        return {
            **{k: v for k, v in dataclasses.asdict(cell).items() if k != 'label'},
            **self.drawn_with(cell),
            **{k: self.config[k] for k in ('seed', 'dtype', 'batch')},
        }

    def draw(self, cell, prompts, first):
        """-> pictures [N,H,W,3] uint8 of prompts [N], with the noise of numbers from `first` on."""
        pipe = self.set(cell)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'prompt of')  # captions are cut as in training
            return pixels(
                pipe(
                    prompts,
                    sampler=cell.sampler,
                    steps=cell.steps,
                    guidance=cell.guidance,
                    seed=self.config.seed,
                    first=first,
                    truncate=True,
                )
            )

    def batches(self, cell, prompts, process=0, processes=1):
        """-> iterator of (numbers [b], pictures [b,H,W,3] uint8, seconds of one) of this process's part.

        All are drawn `batch` at a time, by one program; the last is filled up.
        """
        size = self.config.batch
        for start in range(process * size, len(prompts), processes * size):
            numbers = np.arange(start, min(start + size, len(prompts)))
            chunk = [prompts[i] for i in numbers]
            begun = time.perf_counter()
            drawn = self.draw(cell, chunk + chunk[:1] * (size - len(chunk)), start)
            yield numbers, drawn[: len(chunk)], (time.perf_counter() - begun) / size


def run(config, workdir):
    """Measure all cells of a config -> the results, as in results.json; writes all into `workdir`."""
    workdir, artist = Path(workdir), Artist(config)
    cells, reference = planned(config)
    features = open_features(config.features, mesh=artist.mesh)
    networks = judge.Networks(
        features,
        features if config.clip == config.features else config.clip and open_features(config.clip),
        config.lpips and open_lpips(config.lpips),
    )
    sources = {source: opened(config, source) for _, source, _ in config.sets}
    real = statistics_of(features, *opened(config, config.real))
    results = []
    for name, source, count in config.sets:
        captions, own = captions_of(sources[source], count, config.seed)
        judging = judge.Judge(networks, captions, real)
        bench = Bench(artist, judging, source, workdir / 'cells' / slug(name), reference)
        rows = [judging.real_row(own)]
        for cell in tqdm(cells, desc=name, disable=jax.process_index() > 0):
            rows.append(bench.row(cell))
            if jax.process_index() == 0 and config.prompts:
                illustrate(artist, cell, workdir / 'grid' / f'{slug(cell.name)}.png')
        results.append({'set': name, 'source': source, 'rows': rows, 'folder': slug(name)})
    results = {'protocol': protocol(config, networks, real), 'sets': results}
    if jax.process_index() == 0:
        write(workdir / 'results.json', results)
        report.write(workdir, results, config.title, list(config.prompts))
        say(f'wrote report.md, results.json, plots and grids into {workdir}')
    sharding.wait('evaluated')
    return results


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
    for model in dict.fromkeys(cell.model for cell in cells):
        open_model(model)
    return cells, reference


def alone(key, names):
    """InputError if two names would be one file's."""
    slugs = [slug(name) for name in names]
    twice = [name for name in names if slugs.count(slug(name)) > 1]
    if twice:
        raise InputError(f'two {key} would be called {twice[-1]!r}; give each a name of its own')


def protocol(config, networks, real):
    """What is said beside the numbers."""
    return {
        **{'features': networks.features.identity, 'real': config.real, 'real_pictures': real.n},
        **{'clip': networks.clip and networks.clip.identity, 'paired': config.paired},
        **{'lpips': networks.lpips and networks.lpips.identity, 'seed': config.seed},
        **{'resolution': config.resolution, 'batch': config.batch, 'dtype': config.dtype},
        **{'reference': config.reference},
    }


class Bench:
    """Measures cells for the captions of one set, each once: what is in `folder` is not drawn again."""

    def __init__(self, artist, judging, source, folder, reference):
        self.artist, self.judging, self.source, self.folder = artist, judging, source, folder
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.reference = reference  # the Cell whose pictures the others are compared with, or None
        self.pictures = None  # {number: picture} of it, this process's

    def row(self, cell):
        """-> the cell's row of the results; the reference's is asked for before the others'."""
        made, stem = self.made_of(cell), self.folder / slug(cell.name)
        row = known(stem.with_name(f'{stem.name}.json'), made)
        kept = stem.with_name(f'{stem.name}-{self.process}of{self.processes}.npz')
        is_reference = cell == self.reference
        lacks = row is None or (is_reference and kept_pictures(kept, made) is None)
        if any(sharding.gathered(b'1' if lacks else b'')):  # all draw, or none
            row = self.measured(cell, made, stem, kept if is_reference else None)
        if is_reference:
            self.pictures = kept_pictures(kept, made)
        return row | dataclasses.asdict(cell)  # it may have another label now

    def made_of(self, cell):
        """All that a cell's numbers depend on, besides the tokenizers and the code."""
        c, to = self.artist.config, self.reference
        return {
            **self.artist.made_of(cell),
            **{'reference': self.artist.made_of(to) if to and cell != to else None},
            **{'source': self.source, 'paired': c.paired, 'resolution': c.resolution},
            **self.judging.protocol,
        }

    def measured(self, cell, made, stem, keep):
        """Draw and measure -> the row, written. keep: file for the first pictures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        batches = self.artist.batches(cell, self.judging.captions, self.process, self.processes)
        if keep:
            batches = keeping(batches, self.artist.config.paired, keep, made)
        row = {
            **dataclasses.asdict(cell),
            **{'file': stem.name, 'device': device()},
            **self.judging(batches, self.pictures),
        }
        if self.process == 0:
            write(stem.with_name(f'{stem.name}.json'), {**row, MADE_OF: made})
        return row


def device():
    """What a process draws with, as text."""
    return f'{jax.local_device_count()} {jax.devices()[0].device_kind}'


def keeping(batches, most, file, made):
    """The batches; once they end, the pictures with numbers below `most` are in the file."""
    numbers, pictures = [], []
    for some, drawn, seconds in batches:
        yield some, drawn, seconds
        numbers += some[some < most].tolist()
        pictures += [*drawn[some < most]]
    np.savez_compressed(file, numbers=numbers, pictures=pictures, **{MADE_OF: json.dumps(made)})


def kept_pictures(file, made):
    """-> {number: picture} of what `keeping` wrote; None if it was of something else."""
    try:
        with np.load(file) as found:
            if MADE_OF not in found or str(found[MADE_OF]) != json.dumps(made):
                return None
            return dict(zip(found['numbers'].tolist(), found['pictures'], strict=True))
    except (OSError, ValueError, zipfile.BadZipFile):
        return None


def known(file, made):
    """The row that was measured before, unless it was of something else."""
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return row if row.pop(MADE_OF) == json.loads(json.dumps(made)) else None


def illustrate(artist, cell, file):
    """Draw the config's prompts for the grid, side by side, unless the file shows just these."""
    prompts = list(artist.config.prompts)
    shows = json.dumps({**artist.made_of(cell), 'prompts': prompts})
    if shown(file) == shows:
        return
    drawn = [x for _, pictures, _ in artist.batches(cell, prompts) for x in pictures]
    info = PngInfo()
    info.add_text(MADE_OF, shows)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f'.part-{file.name}')
    Image.fromarray(np.concatenate(drawn, 1)).save(part, pnginfo=info)
    os.replace(part, file)  # it appears whole


def shown(file):
    """What the grid's pictures in a file were made of; '' if it cannot be read."""
    try:
        with Image.open(file) as image:
            return image.info.get(MADE_OF, '')
    except OSError:
        return ''


def opened(config, name):
    """A source's name -> Source, settings, numbers of all its samples."""
    settings = DataSettings(source=name, resolution=config.resolution, crop='center')
    source = open_source(name, settings)
    return source, settings, np.arange(len(source))


def captions_of(there, count, seed):
    """What `opened` gives -> captions [N] to draw, and a function that reads their own pictures."""
    source, settings, _ = there
    ids = picked(source, count, seed)
    unique = np.unique(ids)
    said = {i: caption for i, _, caption in pairs(source, settings, unique)}
    captions = [said[i] for i in ids.tolist() if i in said]
    return captions, lambda: pairs(source, settings, [i for i in ids if i in said])


def write(file, value):
    """A JSON file; it appears whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f'.part-{file.name}')
    part.write_text(json.dumps(value, indent=1) + '\n')
    os.replace(part, file)


def slug(text):
    return re.sub(r'[^a-z0-9.+]+', '-', text.lower()).strip('-')


def start(config, workdir, cluster):
    """`run` as a program: joins the other processes; where one fails, all end."""
    sharding.start_distributed(**cluster)
    with Peers():
        run(config, workdir)


def main(argv=None):
    """Run the command line; bad input ends with one line on stderr and status 1."""
    argv = sys.argv[1:] if argv is None else argv
    if {'-h', '--help'} & {*argv}:
        return print(__doc__)
    try:
        start(*parse(argv))
    except InputError as e:
        sys.exit(f'error: {e}')


if __name__ == '__main__':
    main()
