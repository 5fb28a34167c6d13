"""Quality and time of samplers and step counts, in given features."""

import dataclasses
import time

import numpy as np

from lcm_jax import metrics
from lcm_jax.grid import pixels
from lcm_jax.pipeline import Pipeline

BATCH = 16  # pictures drawn at a time


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way of drawing: a label, a pipeline and its sampler settings."""

    label: str
    pipe: Pipeline
    sampler: str
    steps: int
    guidance: float

    def draw(self, prompts, seed):
        """-> (pictures, seconds of each batch); batches of BATCH, so that one program draws all."""
        pictures, seconds = [], []
        for i in range(0, len(prompts), BATCH):
            chunk = list(prompts[i : i + BATCH])
            padded = chunk + chunk[:1] * (BATCH - len(chunk))
            start = time.perf_counter()
            # Each batch has a seed of its own, so that no two pictures share noise.
            pictures += self.pipe(
                padded,
                sampler=self.sampler,
                steps=self.steps,
                guidance=self.guidance,
                seed=seed + i,
            )[: len(chunk)]
            seconds.append(time.perf_counter() - start)
        return pictures, seconds


def scores(features, pictures, captions, real):
    """pictures [N,H,W,3], their captions [N], real features [M,D] -> {metric: number}."""
    images, texts = features.images(pictures), features.texts(captions)
    return {
        'clip': metrics.clip_score(images, texts),
        'retrieval': metrics.retrieval(images, texts),
        'frechet': metrics.frechet(real, images),
    }


def table(cells, features, samples, other, *, seed=0, progress=lambda x: x):
    """Rows of {label, seconds, clip, retrieval, frechet}, the samples' real pictures first.

    Every cell draws the samples' captions once from the same seeds; seconds per picture are the
    median batch's, BATCH pictures at a time, without the first, which may compile. The Fréchet
    distance is to the features of `other`'s real pictures.
    """
    captions = [s.caption for s in samples]
    real = features.images(np.stack([s.picture for s in other]))
    own = scores(features, np.stack([s.picture for s in samples]), captions, real)
    rows = [{'label': 'real pictures', 'seconds': None, **own}]
    for cell in progress(cells):
        pictures, seconds = cell.draw(captions, seed)
        row = scores(features, pixels(pictures), captions, real)
        warm = float(np.median(seconds[1:] or seconds)) / BATCH
        rows.append({'label': cell.label.replace('\n', ' '), 'seconds': warm, **row})
    return rows


def markdown(rows):
    """Rows of `table` -> a Markdown table."""
    lines = [
        '| | s / picture | CLIP score | retrieval among 100 | Fréchet distance |',
        '|---|---|---|---|---|',
    ]
    for r in rows:
        seconds = '' if r['seconds'] is None else f'{r["seconds"]:.3f}'
        lines.append(
            f'| {r["label"]} | {seconds} | {r["clip"]:.1f} | {r["retrieval"]:.2f} | '
            f'{r["frechet"]:.2f} |'
        )
    return '\n'.join(lines)
