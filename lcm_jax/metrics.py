"""Metrics: features -> number. Features are numpy arrays [N,D]."""

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lcm_jax.errors import InputError


def unit(x):
    """x [N,D] -> rows of length one."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_score(images, texts):
    """Mean of 100 max(cos, 0) over pairs (CLIPScore, arXiv 2104.08718, as torchmetrics scales it)."""
    images, texts = np.asarray(unit(images)), np.asarray(unit(texts))
    return float(100 * np.mean(np.maximum(np.sum(images * texts, -1), 0)))


def retrieval(images, texts, among=100, seed=0):
    """Share of pictures whose own text is the most similar among `among` texts.

    The others are drawn from the same rows of `texts`, without replacement, from `seed`.
    """
    images, texts = np.asarray(unit(images)), np.asarray(unit(texts))
    if len(texts) < among:
        raise InputError(f'retrieval among {among} needs as many texts; there are {len(texts)}')
    rng, found = np.random.default_rng(seed), 0
    for i, image in enumerate(images):
        others = rng.choice(np.delete(np.arange(len(texts)), i), among - 1, replace=False)
        found += image @ texts[i] > np.max(texts[others] @ image)
    return float(found / len(images))


def frechet(real, fake):
    """Fréchet distance of the Gaussians fitted to two feature sets (FID, arXiv 1706.08500, eq. 6)."""
    if min(len(real), len(fake)) < 2:
        raise InputError(
            f'a Fréchet distance needs two rows of each; there are {len(real)} and {len(fake)}'
        )
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    mean = np.sum((real.mean(0) - fake.mean(0)) ** 2)
    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    # tr sqrt(ab) from the symmetric sqrt(sqrt(a) b sqrt(a)): real, and fine with singular matrices.
    values, vectors = scipy.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return float(mean + np.trace(a) + np.trace(b) - 2 * cross)
