"""Metrics against their definitions."""

import numpy as np
import pytest
import scipy.linalg

from lcm_jax import metrics
from lcm_jax.errors import InputError


def test_frechet_is_the_definition_in_float64():
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(size=(200, 12)),
        rng.normal(0.3, 1.5, size=(150, 12)) @ rng.normal(size=(12, 12)),
    )
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real
    )
    assert metrics.frechet(a, b) == pytest.approx(want, rel=1e-6)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_with_fewer_rows_than_features():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(10, 32))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, a + 1) == pytest.approx(
        32, rel=1e-6
    )  # the means differ by one in each axis
    with pytest.raises(InputError, match='two rows'):
        metrics.frechet(a[:1], a)


def test_retrieval_counts_own_captions_that_win():
    texts = np.eye(120)
    images = texts.copy()
    images[:30] = np.roll(texts, 1, 0)[:30]  # these look like another row's caption
    found = metrics.retrieval(images, texts)
    # The other row's caption is among the 99 drawn others with probability 99/119; otherwise the
    # own caption ties with all others at similarity 0, which does not count as found.
    assert found == pytest.approx(90 / 120)
    assert metrics.retrieval(texts, texts) == 1
    with pytest.raises(InputError, match='needs as many'):
        metrics.retrieval(texts[:50], texts[:50])


def test_clip_score_is_100_times_the_mean_positive_cosine():
    images, texts = np.array([[3.0, 0], [0, 2], [1, 0]]), np.array([[1.0, 1], [0, 5], [-1, 0]])
    assert metrics.clip_score(images, texts) == pytest.approx(100 * (0.5**0.5 + 1 + 0) / 3)
