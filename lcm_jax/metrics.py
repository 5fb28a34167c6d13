"""Metrics: features, numpy arrays [N,D], -> numbers; sets of any size stream through `Statistics`."""

import dataclasses

import numpy as np
import scipy.linalg

from lcm_jax.errors import InputError

KEPT = 10_000  # rows of features that Statistics keep, for KID
SUBSETS, SUBSET = 100, 1000  # of KID, as torch-fidelity's
FEW = 10_000  # pictures; a Fréchet distance of fewer is marked as biased


def unit(x):
    """x [N,D] -> rows of length one."""
    x = np.asarray(x)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosines(images, texts):
    """Pairs of features [N,D] -> [N], 100 max(cos, 0): CLIPScore (arXiv 2104.08718) times 40."""
    return 100 * np.maximum(np.sum(unit(images) * unit(texts), -1), 0)


def psnr(a, b):
    """Pictures [N,H,W,3] uint8 -> [N], dB."""
    error = np.mean((a.astype(np.float32) - b) ** 2, (1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def retrieved(images, texts, numbers, among=100, seed=0):
    """Features of pictures [N,D] and of all texts [M,D] -> [N] bool: whether a picture finds its text.

    It does if its own, texts[number], is the most similar of `among`; the others are drawn from `texts`
    by seed and number. A text equal to a picture's own does not stand against it.
    """
    images, texts = unit(images), unit(texts)
    if len(texts) < among:
        raise InputError(f'retrieval among {among} needs as many texts; there are {len(texts)}')
    out = []
    for image, i in zip(images, numbers, strict=True):
        rng = np.random.default_rng((seed, i))
        others = rng.choice(np.delete(np.arange(len(texts)), i), among - 1, replace=False)
        others = others[np.any(texts[others] != texts[i], -1)]
        out.append(image @ texts[i] > np.max(texts[others] @ image, initial=-1))
    return np.array(out)


def looked_at(identity, height, width):
    """What a network of this identity sees in pictures of H x W px: `Statistics.features` of them."""
    return f'{identity}, pictures of {height} x {width} px'


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What FID and KID need to know of a set of pictures, in memory that does not grow with it.

    features: what `looked_at` says of the network and the pictures. n, mean [D] and scatter [D,D], the
    sum of (x - mean)(x - mean)^T, in float64. rows [K,D] float32 are the features of the K = KEPT
    pictures whose `order`, a fixed function of their numbers, is lowest: a sample that depends on the set
    alone, not on its parts.
    """

    features: str
    n: int
    mean: np.ndarray
    scatter: np.ndarray
    rows: np.ndarray
    order: np.ndarray  # [K] uint64, ascending

    @classmethod
    def of(cls, features, x, numbers):
        """Features x [N,D] of the pictures with these numbers in the set -> their Statistics."""
        x = np.asarray(x)
        wide = x.astype(np.float64)
        mean = wide.mean(0)
        order = _scrambled(numbers)
        lowest = np.argsort(order)[:KEPT]
        scatter = (wide - mean).T @ (wide - mean)
        return cls(features, len(x), mean, scatter, x[lowest].astype(np.float32), order[lowest])

    def merge(self, other):
        """Of the union with other pictures (Chan et al. 1979). InputError for other features."""
        self.check(other)
        n, apart = self.n + other.n, other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter = scatter + np.outer(apart, apart) * (self.n * other.n / n)
        order = np.concatenate([self.order, other.order])
        lowest = np.argsort(order)[:KEPT]
        return dataclasses.replace(
            self,
            n=n,
            mean=self.mean + apart * (other.n / n),
            scatter=scatter,
            rows=np.concatenate([self.rows, other.rows])[lowest],
            order=order[lowest],
        )

    def check(self, other):
        """InputError unless both are of the same features."""
        if self.features != other.features:
            raise InputError(
                f'statistics of features {self.features!r} and of {other.features!r} cannot be '
                'compared; measure both sets with the same network, at the same size'
            )

    @property
    def cov(self):
        """[D,D], unbiased."""
        return self.scatter / (self.n - 1)

    def arrays(self):
        """-> {name: array}, as `load` takes them from a .npz file."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def load(cls, file):
        """An open .npz file, or its path -> Statistics. InputError if it holds none."""
        try:
            with np.load(file, allow_pickle=False) as found:
                fields = {f.name: found[f.name] for f in dataclasses.fields(cls)}
        except Exception as e:  # numpy and zipfile raise many types
            raise InputError(f'{file} holds no statistics of pictures: {e}') from e
        return cls(**fields | {'features': str(fields['features']), 'n': int(fields['n'])})


def _scrambled(numbers):
    """[N] int -> [N] uint64, one to one (the finaliser of splitmix64)."""
    x = np.asarray(numbers, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def compare(real, fake):
    """Two sets, as Statistics -> {'fid', 'kid', 'kid_std', 'biased'}: whether FID is, by too few pictures.

    Raises InputError as `frechet` and `kid` do.
    """
    fid, (mean, deviation) = frechet(real, fake), kid(real, fake)
    return {
        'fid': fid,
        'kid': mean,
        'kid_std': deviation,
        'biased': min(real.n, fake.n) < FEW,
    }


def frechet(real, fake):
    """Fréchet distance of the Gaussians fitted to two sets, as Statistics (FID, arXiv 1706.08500, eq. 6).

    Raises InputError for sets of fewer than two pictures, and of different features.
    """
    real.check(fake)
    if min(real.n, fake.n) < 2:
        raise InputError(
            f'a Fréchet distance needs two pictures of each set; there are {real.n} and {fake.n}'
        )
    a, b = real.cov, fake.cov
    mean = np.sum((real.mean - fake.mean) ** 2)
    # tr sqrt(ab) from the symmetric sqrt(sqrt(a) b sqrt(a)): real, and fine with singular matrices.
    values, vectors = scipy.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return float(mean + np.trace(a) + np.trace(b) - 2 * cross)


def kid(real, fake, seed=0):
    """Kernel Inception Distance of two sets, as Statistics (arXiv 1801.01401) -> mean, standard deviation.

    The unbiased squared MMD of the kernel (x.y / D + 1)^3, over SUBSETS draws of SUBSET pictures each. If
    the smaller set has no more, of all but one of it, and without a deviation, None: such draws hardly
    differ. Raises InputError as `frechet` does.
    """
    real.check(fake)
    size = min(SUBSET, len(real.rows) - 1, len(fake.rows) - 1)
    if size < 2:
        raise InputError(f'KID needs three pictures of each set; there are {real.n} and {fake.n}')
    rng = np.random.default_rng(seed)
    draws = [
        mmd(*(rows[rng.choice(len(rows), size, replace=False)] for rows in (real.rows, fake.rows)))
        for _ in range(SUBSETS)
    ]
    return float(np.mean(draws)), float(np.std(draws)) if size == SUBSET else None


def mmd(x, y):
    """Features [N,D] of each -> unbiased squared maximum mean discrepancy, kernel (x.y / D + 1)^3."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def kernel(a, b):
        k = a @ b.T / a.shape[1] + 1
        return k * k * k  # numpy's power of floats takes many times as long

    def within(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()
