"""Matrix and convolution work of a function, counted in its jaxpr: no compiler, no device."""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(fn, *args, platform='tpu'):
    """FLOPs of fn(*args) in products and convolutions, on all devices together; args may be abstract.

    Loops count as often as they run, custom kernels by what they compute inside, padding too, and
    functions chosen by platform (`lax.platform_dependent`) as `platform` has them: of a device's
    name, so that 'gpu' takes the default in place of 'cuda', whose kernels cannot be looked into. Of
    other branches the largest counts. A `while` of unknown length counts once.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, platform)


def _count(jaxpr, platform):
    return sum(_equation(eqn, platform) for eqn in jaxpr.eqns)


def _equation(eqn, platform):
    name, params = eqn.primitive.name, eqn.params
    if name in WORK:
        return WORK[name](*(v.aval for v in (*eqn.invars[:2], eqn.outvars[0])), params)
    if name == 'cond':
        platforms = params.get('branches_platforms') or ()
        named = [
            b
            for b, names in zip(params['branches'], platforms, strict=False)
            if _in(platform, names)
        ]
        return max(_count(b.jaxpr, platform) for b in named[:1] or params['branches'])
    return TIMES.get(name, lambda _: 1)(params) * sum(
        _count(jaxpr, platform) for jaxpr in _inside(params)
    )


def _in(platform, names):
    return names is None or platform in names


def _inside(params):
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, (ClosedJaxpr, Jaxpr)):
                yield getattr(x, 'jaxpr', x)


def _dot(a, b, out, params):
    (contracted, _), _ = params['dimension_numbers']
    return 2 * out.size * math.prod(a.shape[i] for i in contracted)


def _conv(x, kernel, out, params):
    spec = params['dimension_numbers'].rhs_spec  # (outputs, inputs, *space)
    taps = math.prod(kernel.shape[i] for i in spec[1:])
    return 2 * out.size * taps // math.prod(params['lhs_dilation'])  # that puts zeros into x


WORK = {'dot_general': _dot, 'conv_general_dilated': _conv}
# How often an equation runs what is inside.
TIMES = {
    'scan': lambda p: p['length'],
    'pallas_call': lambda p: math.prod(p['grid_mapping'].grid),
    'shard_map': lambda p: math.prod(p['mesh'].shape[axis] for axis in p['newly_manual_axes']),
}
