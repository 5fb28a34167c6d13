"""Metrics against their definitions."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg

from lcm_jax import metrics
from lcm_jax.errors import InputError
from lcm_jax.metrics import Statistics


def of(x, features='f'):
    return Statistics.of(features, x, np.arange(len(x)))


def test_frechet_is_the_definition_in_float64():
    rng = np.random.default_rng()
    a, b = (
        rng.normal(size=(200, 12)),
        rng.normal(0.3, 1.5, size=(150, 12)) @ rng.normal(size=(12, 12)),
    )
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real
    )
    assert metrics.frechet(of(a), of(b)) == pytest.approx(want, rel=1e-6)
    assert metrics.frechet(of(a), of(a)) == pytest.approx(0, abs=1e-8)


def test_frechet_with_fewer_rows_than_features():
    rng = np.random.default_rng()
    a = rng.normal(size=(10, 32))
    assert metrics.frechet(of(a), of(a)) == pytest.approx(0, abs=1e-4)  # roots of what is rounded
    apart = metrics.frechet(of(a), of(a + 1))
    assert apart == pytest.approx(32, rel=1e-5)  # the means differ by one in each axis
    with pytest.raises(InputError, match='two pictures'):
        metrics.frechet(of(a[:1]), of(a))


def test_statistics_add_up_in_any_order():
    rng = np.random.default_rng()
    x = 100 + rng.normal(size=(500, 6))  # far from zero: plain sums of squares would lose digits
    parts = [Statistics.of('f', x[some], some) for some in np.array_split(rng.permutation(500), 7)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    want = of(x)
    assert whole.n == want.n
    np.testing.assert_allclose(whole.mean, want.mean, rtol=1e-12)
    np.testing.assert_allclose(whole.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(whole.rows, want.rows)  # the same sample, whatever the parts


def test_the_rows_kept_do_not_grow(monkeypatch):
    monkeypatch.setattr(metrics, 'KEPT', 50)
    x = np.random.default_rng().normal(size=(300, 4))
    parts = [Statistics.of('f', x[i : i + 60], np.arange(i, i + 60)) for i in range(0, 300, 60)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    assert whole.rows.shape == (50, 4) and whole.n == 300
    np.testing.assert_array_equal(whole.rows, of(x).rows)


def test_statistics_of_other_features_are_refused():
    a, b = of(np.zeros((3, 2)), 'inception'), of(np.zeros((3, 2)), 'emoji')
    for function in (metrics.frechet, metrics.kid, Statistics.merge):
        with pytest.raises(InputError, match="features 'inception' and of 'emoji'"):
            function(a, b)


def test_statistics_of_a_file(tmp_path):
    want = of(np.random.default_rng().normal(size=(20, 3)))
    np.savez(tmp_path / 'x.npz', **want.arrays())
    found = Statistics.load(tmp_path / 'x.npz')
    assert metrics.frechet(found, want) == pytest.approx(0, abs=1e-9)
    assert dataclasses.asdict(found).keys() == dataclasses.asdict(want).keys()


def test_mmd_is_the_definition():
    rng = np.random.default_rng()
    x, y = rng.normal(size=(30, 5)), rng.normal(0.2, 1.1, size=(40, 5))

    def k(a, b):
        return (np.dot(a, b) / 5 + 1) ** 3

    want = (
        np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        + np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
        - 2 * np.mean([k(a, b) for a in x for b in y])
    )
    assert metrics.mmd(x, y) == pytest.approx(want, rel=1e-9)


def test_kid_is_unbiased_and_tells_sets_apart():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1500, 8))
    same, deviation = metrics.kid(of(x), of(y))
    apart, _ = metrics.kid(of(x), of(y + 0.5))
    assert abs(same) < 2 * deviation and apart > 20 * abs(same)
    few, none = metrics.kid(of(x[:900]), of(y))
    assert abs(few) < 0.1 * apart and none is None  # nearly the same draws: no measure of chance
    with pytest.raises(InputError, match='three pictures'):
        metrics.kid(of(x[:2]), of(y))


def test_retrieval_counts_own_captions_that_win():
    texts = np.eye(120)
    images = texts.copy()
    images[:30] = np.roll(texts, 1, 0)[:30]  # these look like another row's caption
    found = metrics.retrieved(images, texts, np.arange(120))
    # The other row's caption is among the 99 drawn others with probability 99/119; otherwise the
    # own caption ties with all others at similarity 0, which does not count as found.
    assert found.mean() == pytest.approx(90 / 120)
    assert metrics.retrieved(texts, texts, np.arange(120)).all()
    parts = [
        metrics.retrieved(images[i : i + 40], texts, np.arange(i, i + 40)) for i in (0, 40, 80)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), found)
    with pytest.raises(InputError, match='needs as many'):
        metrics.retrieved(texts[:50], texts[:50], np.arange(50))


def test_the_same_caption_twice_does_not_stand_against_itself():
    texts = np.repeat(np.eye(60), 2, 0)
    assert metrics.retrieved(texts, texts, np.arange(120)).all()


def test_clip_score_is_100_times_the_mean_positive_cosine():
    images, texts = np.array([[3.0, 0], [0, 2], [1, 0]]), np.array([[1.0, 1], [0, 5], [-1, 0]])
    np.testing.assert_allclose(metrics.cosines(images, texts), [100 * 0.5**0.5, 100, 0])


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1] = 255
    np.testing.assert_allclose(metrics.psnr(a[1:], b[1:]), 0, atol=1e-6)
    b[1] = 51  # a fifth of the range
    np.testing.assert_allclose(metrics.psnr(a[1:], b[1:]), 20 * np.log10(5), rtol=1e-6)
