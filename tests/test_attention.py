"""Attention against a float64 reference, and its memory."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lcm_jax.models import attention
from lcm_jax.models.attention import BLOCK, SMALL, attend

CASES = {  # name: (B, L, M, H, D, causal)
    'few tokens': (2, 64, 64, 4, 16, False),
    'one token': (1, 1, 1, 2, 8, False),
    'few tokens, causal': (2, 77, 77, 4, 16, True),
    'few tokens, cross': (2, 65, 7, 4, 16, False),
    'many whole blocks': (1, 4096, 4096, 1, 8, False),
    'a block and a rest': (2, 1801, 1801, 2, 8, False),
    'causal, a block and a rest': (1, 1801, 1801, 2, 8, True),
    'cross, less than a block': (2, 4099, 77, 2, 8, False),
    'more keys than queries': (1, 77, 4099, 2, 8, False),
    'causal, more keys than queries': (1, 401, 601, 2, 8, True),
}


def reference(q, k, v, g, causal):
    """Attention and its gradients for the cotangent g, in float64."""
    q, k, v = (torch.tensor(np.float64(x), requires_grad=True) for x in (q, k, v))
    s = torch.einsum('blhd,bmhd->bhlm', q, k) * q.shape[-1] ** -0.5
    if causal:
        s = s.where(torch.ones(s.shape[-2:], dtype=bool).tril(), -torch.inf)
    out = torch.einsum('bhlm,bmhd->blhd', s.softmax(-1), v)
    out.backward(torch.tensor(np.float64(g)))
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


def with_gradients(q, k, v, g, causal):
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, causal=causal), q, k, v)
    return out, *vjp(g)


@pytest.mark.parametrize(
    ('name', 'dtype', 'tolerance'),
    [
        *((name, jnp.float32, 3e-6) for name in CASES),
        *((name, jnp.bfloat16, 6e-3) for name in CASES),
        ('few tokens, causal', jnp.float16, 1e-3),
    ],
)
def test_equals_the_reference(name, dtype, tolerance):
    b, l, m, h, d, causal = CASES[name]
    rng = np.random.default_rng(0)
    # Scores up to about 30, so that the largest must be taken off before exp in half precision.
    q, k, v, g = (
        jnp.asarray(scale * rng.normal(size=(b, n, h, d)), dtype)
        for scale, n in ((3, l), (2, m), (1, m), (1, l))
    )
    ours = jax.jit(with_gradients, static_argnums=4)(q, k, v, g, causal)
    for what, x, y in zip(
        ('out', 'dq', 'dk', 'dv'), ours, reference(q, k, v, g, causal), strict=True
    ):
        assert x.dtype == dtype
        error = np.abs(np.float64(x) - y).max() / max(np.abs(y).max(), 1e-3)
        print(f'{name}, {dtype.__name__}, {what}: {error:.1e}')
        assert error <= tolerance, what


def test_the_cases_reach_every_path():
    sizes = [(l, m) for _, l, m, *_ in CASES.values()]
    rows = [(l, BLOCK // m) for l, m in sizes if l * m > SMALL]
    assert len(rows) < len(sizes)
    assert any(l < n for l, n in rows)
    assert any(l > n and l % n for l, n in rows)
    assert any(l > n and not l % n for l, n in rows)


def test_huge_scores_stay_finite():
    x = jnp.full((1, 600, 1, 8), 1e4)
    for y in jax.jit(with_gradients, static_argnums=4)(x, x, x, x, False):
        assert np.isfinite(y).all()


LARGE = jax.ShapeDtypeStruct((1, 4096, 8, 40), jnp.float32)


@pytest.mark.parametrize(('fn', 'count'), [(attend, 3), (with_gradients, 4)])
def test_no_array_of_tokens_by_tokens(fn, count):
    fn = fn if fn is attend else lambda *args: with_gradients(*args, False)
    compiled = jax.jit(fn).lower(*[LARGE] * count).compile()
    assert '4096,4096' not in compiled.as_text()
    temp = compiled.memory_analysis().temp_size_in_bytes
    print(f'{temp / 2**20:.0f} MiB of temporaries')
    assert temp < 4 * 4096**2  # one head's scores; all of them are 8 times as large


@pytest.mark.parametrize(('capability', 'fits'), [('7.5', False), ('8.0', True), ('12.0', True)])
def test_cudnn_is_for_cards_that_have_its_kernel(monkeypatch, capability, fits):
    card = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, 'devices', lambda platform: [card])
    q = jnp.zeros((1, 4096, 8, 40), jnp.bfloat16)
    assert attention._fits_cudnn(q) == fits
    assert not attention._fits_cudnn(q.astype(jnp.float32))


@pytest.mark.parametrize('platform', ['cuda', 'rocm', 'tpu'])
@pytest.mark.parametrize('causal', [True, False])
def test_lowers_for_another_platform(platform, causal):
    fn = lambda *args: with_gradients(*args, causal)  # noqa: E731
    text = jax.jit(fn).trace(*[LARGE] * 4).lower(lowering_platforms=(platform,)).as_text()
    assert '4096x4096' not in text
    if platform == 'tpu' and not causal:
        assert 'tpu_custom_call' in text
    else:
        assert f'8x{BLOCK // 4096}x4096xf32' in text  # heads side by side
