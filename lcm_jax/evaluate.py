"""Quality and time of samplers and step counts, in the features of the model's own CLIP."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import data, metrics
from lcm_jax.grid import pixels
from lcm_jax.models.clip import ImageEncoder, TextEncoder
from lcm_jax.pipeline import Pipeline, read_component
from lcm_jax.train import batched


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way of drawing: a label, a pipeline and its sampler settings."""

    label: str
    pipe: Pipeline
    sampler: str
    steps: int
    guidance: float

    def draw(self, prompts, seed):
        return self.pipe(list(prompts), sampler=self.sampler, steps=self.steps, guidance=self.guidance,
                         seed=seed)


class Features:
    """The image tower of a pipeline folder (`image_encoder`) beside its text tower, as metrics see them."""

    def __init__(self, pipe):
        spec, params = read_component(pipe.folder, 'image_encoder')
        self.size, self.tokenizer = spec.size, pipe.tokenizer
        self._image = jax.jit(lambda x: ImageEncoder(spec).apply({'params': params}, x))
        text, text_params = pipe.text, pipe.params['text_encoder']
        self._text = jax.jit(lambda ids: TextEncoder(text).apply({'params': text_params}, ids).pooled)

    def images(self, pictures):
        """[N,H,W,3] uint8 -> [N,D] float32."""
        x = jnp.asarray(data.to_float(pictures))
        if x.shape[1:3] != (self.size, self.size):
            x = jax.image.resize(x, (len(x), self.size, self.size, 3), 'bicubic')
        return batched(self._image, np.asarray(x))

    def texts(self, captions):
        """[N] str -> [N,D] float32."""
        return batched(self._text, self.tokenizer(captions))


def seconds_per_picture(cell, prompt, seed=0):
    """Median seconds of drawing one picture alone, the compiled program warm."""
    cell.draw([prompt], seed)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        cell.draw([prompt], seed)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def scores(features, pictures, captions, real):
    """pictures [N,H,W,3], their captions [N], real features [M,D] -> {metric: number}."""
    images, texts = features.images(pictures), features.texts(captions)
    return {'clip': metrics.clip_score(images, texts), 'retrieval': metrics.retrieval(images, texts),
            'frechet': metrics.frechet(real, images)}


def table(cells, features, samples, other, *, seed=0, batch=51, progress=lambda x: x):
    """Rows of {label, sampler, steps, guidance, seconds, clip, retrieval, frechet}, the real pictures first.

    Every cell draws the samples' captions once from the same seeds; the Fréchet distance is to the
    features of `other`'s real pictures.
    """
    captions = [s.caption for s in samples]
    real = features.images(np.stack([s.picture for s in other]))
    rows = [{'label': 'real pictures', 'seconds': None,
             **scores(features, np.stack([s.picture for s in samples]), captions, real)}]
    for cell in progress(cells):
        # A batch starts from the seed plus its own start, so that no two pictures share noise.
        pictures = [p for i in range(0, len(captions), batch)
                    for p in cell.draw(captions[i:i + batch], seed + i)]
        rows.append({'label': cell.label, 'seconds': seconds_per_picture(cell, captions[0]),
                     **scores(features, pixels(pictures), captions, real)})
    return rows


def markdown(rows):
    """Rows of `table` -> a Markdown table."""
    lines = ['| | s / picture | CLIP score | retrieval among 100 | Fréchet distance |',
             '|---|---|---|---|---|']
    for r in rows:
        seconds = '' if r['seconds'] is None else f'{r["seconds"]:.3f}'
        lines.append(f'| {r["label"]} | {seconds} | {r["clip"]:.1f} | {r["retrieval"]:.2f} | '
                     f'{r["frechet"]:.2f} |')
    return '\n'.join(lines)
