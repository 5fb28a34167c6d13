"""Draws an evaluation's cells: pictures to measure, and strips of them to look at."""

import dataclasses
import json
import time
import warnings

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lcm_jax.cells import terms
from lcm_jax.grid import pixels, save
from lcm_jax.pipeline import Pipeline
from lcm_jax.sharding import local_mesh
from lcm_jax.tree import digest

MADE_OF = 'made_of'  # in files: all that they depend on


class Artist:
    """Draws cells, holding one model at a time, on all devices of this process."""

    def __init__(self, config):
        self.config, self.pipe, self.set_to, self.known = config, None, None, {}
        self.mesh = local_mesh()

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
                    spacing=cell.spacing or None,
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


def illustrate(artist, cell, file):
    """Draw the config's prompts for the grid, side by side, unless the file shows just these."""
    prompts = list(artist.config.prompts)
    shows = {**artist.made_of(cell), 'prompts': prompts}
    if shown(file) == json.loads(json.dumps(shows)):
        return
    drawn = [x for _, pictures, _ in artist.batches(cell, prompts) for x in pictures]
    info = PngInfo()
    info.add_text(MADE_OF, json.dumps(shows))
    save(Image.fromarray(np.concatenate(drawn, 1)), file, pnginfo=info)


def shown(file):
    """What the grid's pictures in a file were made of; None if it cannot be read."""
    try:
        with Image.open(file) as image:
            return json.loads(image.info.get(MADE_OF, 'null'))
    except (OSError, ValueError):
        return None
