"""From the tensors of one module in a file to its update as a low-rank pair.

Every method of the LoRA family that needs no base weight makes a matrix up [out, r] @ down [r, n],
where n is inputs times kernel size: LoRA (arXiv 2106.09685), and LyCORIS' LoCon, LoHa and LoKr
(arXiv 2309.14859), with or without the Tucker form of convolutions.
"""

import numpy as np

from lcm_jax.lora_files import peft_config


class Misfit(Exception):
    """(what is wrong, with which tensors) of a module whose tensors do not make its update."""


def update(tensors, options, module, shape=None):
    """{role: array or Tensor} of one module -> up [out, r], down [r, n] in float32.

    The scale alpha / r is in `up`. options: the file's peft options. shape: of the module's weight
    in the checkpoint, (out, in) or (out, in, k, k); None: what the tensors imply. Raises Misfit if
    they make no such update.
    """
    factors = {role: np.asarray(x, np.float32) for role, x in tensors.items() if role != 'alpha'}
    lacking = _lacking(factors.keys())
    if lacking:
        raise Misfit('are incomplete', f'has {" and ".join(factors) or "alpha"} without {lacking}')
    try:
        if any(x.ndim < 2 for x in factors.values()):
            raise ValueError('factors of fewer than two axes')
        shape = shape or _implied_shape(factors)
        method = next(method for roles, method in METHODS if roles == factors.keys())
        up, down, rank = method(factors, shape)
        if not _fits(up, down, shape):
            raise ValueError('factors of another shape')
    except (ValueError, IndexError) as e:
        shapes = ' and '.join(str(x.shape) for x in factors.values())
        weight = f' for {tuple(map(int, shape))}' if shape else ''
        raise Misfit('do not fit the weight', f'has {shapes}{weight}') from e
    alpha = None if rank is None else tensors.get('alpha')
    if alpha is not None and alpha.size != 1:
        raise Misfit('have an alpha that is not one number', f'of shape {alpha.shape}')
    alpha = None if alpha is None else float(np.asarray(alpha, np.float32).item())
    scale = peft_config.scale(alpha, rank, options, module)
    if not all(np.isfinite(x).all() for x in (up, down, scale)):
        raise Misfit('hold values that are not finite', '')
    return scale * up, down


def _lacking(roles):
    """What a module's `roles` lack to be complete, as text; '' if they are."""
    rest = min((want - roles for want, _ in METHODS if roles <= want), key=len, default=None)
    return ' and '.join(sorted(rest)) if rest is not None else 'all of one method'


def _fits(up, down, shape):
    return (
        len(up) == shape[0] and up.shape[1] == len(down) > 0 and down[0].size == np.prod(shape[1:])
    )


def _flat(x):
    return x.reshape(len(x), -1)


def _lora(t, shape):
    up, down = t['up'], t['down']
    if _kernel(down.shape) != _kernel(shape) or _kernel(up.shape):
        raise ValueError('factors of another shape')
    return _flat(up), _flat(down), len(down)


def _kernel(shape):
    """Kernel size of a weight: () for a matrix and for 1 x 1, which are the same."""
    return tuple(shape[2:]) if any(n != 1 for n in shape[2:]) else ()


def _locon(t, shape):
    up, down = _flat(t['up']), _flat(t['down'])
    return *_tucker(up, t['mid'], down), len(down)


def _tucker(up, core, down):
    """up [out, p], core [p, q, k, k], down [q, in] -> a pair for the convolution."""
    return up, _flat(np.einsum('pqkl,qi->pikl', core, down))


def _part(t, name, core):
    """A LyCORIS matrix given as factors w_a, w_b with an optional core -> (up, down)."""
    a, b = t[f'{name}_a'], t[f'{name}_b']
    if len(b) not in a.shape:
        raise ValueError('factors of different ranks')
    return _tucker(a.T, t[core], b) if core in t else (a, _flat(b))


def _loha(t, shape):
    """Hadamard product of two low-rank matrices: of rank r * r at most."""
    (a, b), (c, d) = _part(t, 'hada_w1', 'hada_t1'), _part(t, 'hada_w2', 'hada_t2')
    if not (_fits(a, b, shape) and _fits(c, d, shape)):
        raise ValueError('factors of another shape')
    rank = t['hada_w1_b'].shape[0]
    if len(b) * len(d) > min(a.shape[0], b.shape[1]):
        return *_whole((a @ b) * (c @ d)), rank
    up, down = a[:, :, None] * c[:, None], b[:, None] * d[None]
    return _flat(up), down.reshape(-1, down.shape[-1]), rank


def _lokr(t, shape):
    """Kronecker product of two matrices, each whole or as factors."""
    (a, b), (c, d) = (
        _whole(_flat(t[name])) if name in t else _part(t, name, core) for name, core in LOKR
    )
    if len(a) * len(c) != shape[0] or b[0].size * d[0].size != np.prod(shape[1:]):
        raise ValueError('factors of another shape')
    rank = next((len(t[name]) for name in RANK if name in t), None)
    return np.kron(a, c), np.kron(b, d), rank


def _whole(w):
    """A full matrix as a pair of the least rank that is sure to hold it."""
    one = np.eye(min(w.shape), dtype=w.dtype)
    return (one, w) if len(w) <= w.shape[1] else (w, one)


_LOHA = {'hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'}
RANK = 'down', 'hada_w1_b', 'lokr_w2_b', 'lokr_w1_b'  # the first that is there has the rank
LOKR = ('lokr_w1', None), ('lokr_w2', 'lokr_t2')  # the matrices and their cores
METHODS = (  # the roles that a module has in the file, all of them and no other
    ({'up', 'down'}, _lora),
    ({'up', 'down', 'mid'}, _locon),
    (_LOHA, _loha),
    (_LOHA | {'hada_t1', 'hada_t2'}, _loha),
    ({'lokr_w1', 'lokr_w2'}, _lokr),
    ({'lokr_w1', 'lokr_w2_a', 'lokr_w2_b'}, _lokr),
    ({'lokr_w1', 'lokr_w2_a', 'lokr_w2_b', 'lokr_t2'}, _lokr),
    ({'lokr_w1_a', 'lokr_w1_b', 'lokr_w2'}, _lokr),
    ({'lokr_w1_a', 'lokr_w1_b', 'lokr_w2_a', 'lokr_w2_b'}, _lokr),
    ({'lokr_w1_a', 'lokr_w1_b', 'lokr_w2_a', 'lokr_w2_b', 'lokr_t2'}, _lokr),
)
NAMES = {_lora: 'LoRA', _locon: 'LoCon', _loha: 'LoHa', _lokr: 'LoKr'}


def _implied_shape(tensors):
    """{role: array} of a complete module -> the shape of its weight, as far as the file tells.

    The kernel's axes may be joined with the inputs.
    """
    if 'down' in tensors:
        core = tensors.get('mid', tensors['down'])
        return len(tensors['up']), tensors['down'].shape[1], *core.shape[2:]
    if 'hada_w1_b' in tensors:
        a, b = tensors['hada_w1_a'], _flat(tensors['hada_w1_b'])
        if 'hada_t1' in tensors:
            return a.shape[1], b.shape[1], *tensors['hada_t1'].shape[2:]
        return a.shape[0], b.shape[1]
    sides = []
    for name, core in LOKR:
        if name in tensors:
            sides.append(_flat(tensors[name]).shape)
        else:
            up, down = _part(tensors, name, core)
            sides.append((len(up), down.shape[1]))
    return tuple(np.prod(sides, axis=0))


def ranked(roles):
    """Whether a module of these `roles` has a rank; if not, its alpha means nothing."""
    return any(role in roles for role in RANK)


def name(roles):
    """The name of the method that a module's `roles` are of."""
    found = next((method for want, method in METHODS if roles <= want), None)
    return NAMES.get(found, 'unknown')
