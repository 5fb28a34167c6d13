"""Sums of adapters and adapters of differences, exactly or to a given rank. Adapters as in lora.py."""

import numpy as np

from lcm_jax.errors import InputError

OVERSAMPLE = 16  # columns that the randomized SVD draws beyond the rank
POWER = 4  # its power iterations


def norm(ab):
    """Frobenius norm of down @ up, without forming the product."""
    down, up = matrices(ab)
    return float(max(np.vdot(down.T @ down, up @ up.T), 0.0)) ** 0.5


def matrices(ab):
    """{'down', 'up'} -> [n, r], [r, out] float32; n is inputs times kernel size."""
    down, up = (np.asarray(ab[k], np.float32) for k in ('down', 'up'))
    return down.reshape(-1, down.shape[-1]), up.reshape(up.shape[-2:])


def total(terms):
    """[(adapter, scale)] -> the adapter of the weighted sum, exact: ranks add up."""
    out = {}
    for adapter, scale in terms:
        for path, ab in adapter.items():
            down, up = np.asarray(ab['down']), np.asarray(ab['up']) * np.float32(scale)
            if path in out:
                down = np.concatenate([out[path]['down'], down], -1)
                up = np.concatenate([out[path]['up'], up], -2)
            out[path] = {'down': down, 'up': up}
    return out


def balanced(ab):
    """The same update, exactly, with factors of like size, so that half precision keeps both."""
    down, up = (np.abs(ab[k]).max() for k in ('down', 'up'))
    power = np.float32(2.0 ** round(np.log2(up / down) / 2)) if down and up else np.float32(1)
    return {'down': ab['down'] * power, 'up': ab['up'] / power}


def truncated(ab, rank):
    """The best approximation of an update by one of `rank` or less -> (adapter, norm of the error).

    Exact: the QR of both factors leaves an SVD of r x r, so the product is never formed.
    """
    down, up = matrices(ab)
    q, r = np.linalg.qr(down)
    p, s = np.linalg.qr(up.T)
    u, sigma, v = np.linalg.svd(r @ s.T)
    left, right = q @ u[:, :rank], v[:rank] @ p.T
    pair = _balanced(left, sigma[:rank], right, ab['down'].shape)
    return pair, float(np.linalg.norm(sigma[rank:]))


def factored(delta, rank):
    """A full update, kernel-shaped, as factors of `rank` or less -> (adapter, norm of the error).

    An exact SVD where it is cheap, else a randomized one (Halko, Martinsson, Tropp,
    arXiv 0909.4061, algorithm 4.4) of fixed seed with OVERSAMPLE columns and POWER iterations,
    whose error is within a few per cent of the least; the error told is that of the factors made.
    All of SD 1.5 takes about a minute; on a busy machine OPENBLAS_NUM_THREADS=1 is far faster.
    """
    matrix = np.asarray(delta, np.float32).reshape(-1, delta.shape[-1])
    width = rank + OVERSAMPLE
    if min(matrix.shape) <= 2 * width:
        u, sigma, v = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, sigma, v = _randomized(matrix, width)
    u, sigma, v = u[:, :rank], sigma[:rank], v[:rank]
    error = np.linalg.norm(matrix - (u * sigma) @ v)
    return _balanced(u, sigma, v, delta.shape), float(error)


def _randomized(matrix, width):
    """The first `width` singular triples, nearly."""
    if len(matrix) < matrix.shape[1]:  # the columns, which are made orthogonal, be the fewer
        u, sigma, v = _randomized(matrix.T, width)
        return v.T, sigma, u.T
    q = np.random.default_rng(0).normal(size=(matrix.shape[1], width)).astype(np.float32)
    for _ in range(POWER):
        q = np.linalg.qr(matrix.T @ (matrix @ q))[0]
    u, sigma, v = np.linalg.svd(matrix @ q, full_matrices=False)
    return u, sigma, v @ q.T


def _balanced(left, sigma, right, shape):
    """left diag(sigma) right as {'down', 'up'} of like size; shape: of the kernel or of `down`."""
    root = np.sqrt(sigma)
    up = root[:, None] * right
    return {
        'down': (left * root).reshape(*shape[:-1], len(root)),
        'up': up.reshape(*(1,) * (len(shape) - 2), *up.shape),
    }


def relative(errors, norms):
    """Norms of errors and of what they are of -> the error of the whole, relative."""
    whole = float(np.linalg.norm(norms))
    if not whole:
        raise InputError('the update is zero')
    return float(np.linalg.norm(errors)) / whole
