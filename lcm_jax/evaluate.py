"""Measure ways of drawing: models x LoRAs x samplers x guidance x steps.

    python -m lcm_jax.evaluate --config=configs/eval_NAME.py --workdir=DIR [--config.KEY=VALUE ...]

KEY is one of configs/eval.py. DIR is for results.json, report.md, plots, grids, and a file for each cell
that is measured: the same command again goes on where it was stopped. Several processes, started as for
training, share the drawing.
"""

import dataclasses
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from lcm_jax import flags, judge, processes, report
from lcm_jax.artist import MADE_OF, Artist, illustrate
from lcm_jax.atomic import whole, write_json
from lcm_jax.cells import planned, slug
from lcm_jax.data.pairs import pairs, picked, spread
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.features import open_features, open_lpips
from lcm_jax.logs import say
from lcm_jax.measure import statistics_of
from lcm_jax.peers import Peers, meet


def run(config, workdir):
    """Measure all cells of a config -> the results, as in results.json; writes all into `workdir`."""
    workdir, artist = Path(workdir), Artist(config)
    cells, reference = planned(config)
    features, clip = open_features(config.features, mesh=artist.mesh), None
    if config.clip:
        same = config.clip == config.features
        clip = features if same else open_features(config.clip, mesh=artist.mesh)
    lpips = open_lpips(config.lpips, mesh=artist.mesh) if config.lpips else None
    networks = judge.Networks(features, clip, lpips)
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
        write_json(workdir / 'results.json', results)
        report.write(workdir, results, config.title, list(config.prompts))
        say(f'wrote report.md, results.json, plots and grids into {workdir}')
    meet('evaluated')
    return results


def protocol(config, networks, real):
    """What is said beside the numbers."""
    return {
        'features': networks.features.identity,
        'clip': networks.clip and networks.clip.identity,
        'lpips': networks.lpips and networks.lpips.identity,
        'real': config.real,
        'real_pictures': real.n,
        'paired': config.paired,
        'reference': config.reference,
        'resolution': config.resolution,
        'seed': config.seed,
        'batch': config.batch,
        'dtype': config.dtype,
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
        row = kept_row(stem.with_name(f'{stem.name}.json'), made)
        kept = stem.with_name(f'{stem.name}-{self.process}of{self.processes}.npz')
        is_reference = cell == self.reference
        lacks = row is None or (is_reference and kept_pictures(kept, made) is None)
        if processes.anywhere(lacks):  # all draw, or none
            row = self.measured(cell, made, stem, kept if is_reference else None)
        if is_reference:
            self.pictures = kept_pictures(kept, made)
        return row | dataclasses.asdict(cell)  # it may have another label now

    def made_of(self, cell):
        """All that a cell's numbers depend on, besides the tokenizers and the code."""
        c, to = self.artist.config, self.reference
        return {
            **self.artist.made_of(cell),
            'reference': self.artist.made_of(to) if to and cell != to else None,
            'source': self.source,
            'paired': c.paired,
            'resolution': c.resolution,
            **self.judging.protocol,
        }

    def measured(self, cell, made, stem, keep):
        """Draw and measure -> the row, written. keep: file for the pictures that others are compared with."""
        self.folder.mkdir(parents=True, exist_ok=True)
        batches = self.artist.batches(cell, self.judging.captions, self.process, self.processes)
        if keep:
            compared = spread(len(self.judging.captions), self.artist.config.paired)
            batches = keeping(batches, compared, keep, made)
        row = {
            **dataclasses.asdict(cell),
            'file': stem.name,
            'device': device(),
            **self.judging(batches, self.pictures),
        }
        if self.process == 0:
            write_json(stem.with_name(f'{stem.name}.json'), {**row, MADE_OF: made})
        return row


def device():
    """What a process draws with, as text."""
    return f'{jax.local_device_count()} {jax.devices()[0].device_kind}'


def keeping(batches, chosen, file, made):
    """The batches; once they end, the pictures with the chosen numbers are in the file."""
    numbers, pictures = [], []
    for some, drawn, seconds in batches:
        yield some, drawn, seconds
        kept = np.isin(some, chosen)
        numbers += some[kept].tolist()
        pictures += [*drawn[kept]]
    with whole(file) as part:
        np.savez_compressed(part, numbers=numbers, pictures=pictures, **{MADE_OF: json.dumps(made)})


def kept_pictures(file, made):
    """-> {number: picture} of what `keeping` wrote; None if it was of something else."""
    try:
        with np.load(file) as found:
            if json.loads(str(found[MADE_OF])) != json.loads(json.dumps(made)):
                return None
            return dict(zip(found['numbers'].tolist(), found['pictures'], strict=True))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def kept_row(file, made):
    """The row that was measured before, unless it was of something else."""
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return row if row.pop(MADE_OF, None) == json.loads(json.dumps(made)) else None


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


def start(config, workdir, cluster):
    """`run` as a program: joins the other processes; where one fails, all end."""
    processes.start_distributed(**cluster)
    with Peers():
        run(config, workdir)


def main(argv=None):
    """Run the command line."""
    flags.program(start, 'ways', __doc__, argv)


if __name__ == '__main__':
    main()
