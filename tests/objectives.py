"""Small UNets, adapters and draws, and the same in diffusers and peft: what objectives are tested on."""

import dataclasses
import functools

import diffusers
import jax
import numpy as np
import peft
import torch

from lcm_jax import lora, weights
from lcm_jax.distill import Draws
from lcm_jax.models import configs
from lcm_jax.models.shapes import unet_shapes
from lcm_jax.models.unet import UNetSpec

torch.set_num_threads(1)

TOLERANCE = 1e-3
SPEC = UNetSpec(
    widths=(8, 16),
    down=((0,), (0,)),
    mid=1,
    up=((0, 0), (0, 0)),
    heads=(2, 2),
    context_dim=12,
    groups=4,
)
XL = dataclasses.replace(SPEC, linear_proj=True, pooled_dim=5, size_dim=4)  # SDXL's inputs
RANK, ALPHA = 4, 6
HUBER_C = 0.001
# What LCM-LoRA adapts, in the words of the script.
TARGETS = [
    *('to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'proj_out', 'ff.net.0.proj', 'ff.net.2'),
    *(
        'conv1',
        'conv2',
        'conv_shortcut',
        'downsamplers.0.conv',
        'upsamplers.0.conv',
        'time_emb_proj',
    ),
]
KINDS = ('epsilon', 'v_prediction')


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(tree, seed):
    """Kernels of norm 1 per output channel; biases and norms' scales around a half."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        value = rng.normal(size=x.shape)
        value = value * np.prod(x.shape[:-1]) ** -0.5 if x.ndim > 1 else 0.5 + 0.2 * value
        return value.astype(np.float32)

    return jax.tree.map(leaf, tree)


@functools.cache
def base(spec=SPEC):
    return randomised(unet_shapes(spec), 0)


@functools.cache
def adapter(seed, spec=SPEC):
    """As after training: neither factor is zero."""
    make = functools.partial(lora.init, params=base(spec), rank=RANK)
    return randomised(jax.eval_shape(make, jax.random.key(0)), seed)


def batch_and_draws(spec=SPEC):
    """Six samples; the first steps to time 0, the second from the noisiest solver time."""
    shape = (6, 4, 4, 4)
    index = np.array([0, 49, 1, 24, 37, 10])
    t = 20 * (index + 1) - 1
    batch = {
        'z': random(0, *shape),
        'cond': {'context': random(1, 6, 3, 12)},
        'null': {'context': random(2, 6, 3, 12)},
    }
    if spec.pooled_dim:  # the null condition keeps the sizes
        sizes = np.float32([[64, 48, 8, 0, 32, 32]] * 6)
        for seed, part in enumerate(('cond', 'null'), 7):
            batch[part] |= {'pooled': random(seed, 6, spec.pooled_dim), 'sizes': sizes}
    w = np.random.default_rng(3).uniform(3, 15, 6).astype(np.float32)
    return batch, Draws(random(4, *shape), t, np.maximum(t - 20, 0), w), index


def unet_peer(spec, params):
    """diffusers' UNet with our parameters."""
    unet = diffusers.UNet2DConditionModel.from_config(configs.unet_config(spec, 8))
    unet.load_state_dict({k: torch.tensor(x) for k, x in weights.dump(params).items()})
    return unet


def peer(adapters, targets=TARGETS, spec=SPEC):
    """`unet_peer` of `base(spec)` with, by name, peft adapters with our factors."""
    unet = unet_peer(spec, base(spec)).requires_grad_(False)
    for name in adapters:
        unet.add_adapter(
            peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), adapter_name=name
        )
    parameters = dict(unet.named_parameters())
    for name, ab in adapters.items():
        for (path, leaf), key, perm in factors(ab, name):
            assert parameters[key].shape == np.transpose(ab[path][leaf], perm).shape
            parameters[key].data = torch.tensor(np.transpose(ab[path][leaf], perm))
    # every factor of peft's is one of ours
    lora_keys = {k for k in parameters if '.lora_' in k}
    assert lora_keys == {key for name, ab in adapters.items() for _, key, _ in factors(ab, name)}
    return unet


def factors(ab, name):
    """[((path, leaf), peft's parameter name, permutation to peft's axes)]."""
    for path, pair in ab.items():
        key, perm = weights.theirs(path, pair['down'].ndim)
        for leaf, side in (('down', 'lora_A'), ('up', 'lora_B')):
            yield (path, leaf), f'{key.removesuffix(".weight")}.{side}.{name}.weight', perm


class DDIMSolver:
    """The script's."""

    def __init__(self, alpha_cumprods, timesteps=1000, ddim_timesteps=50):
        ratio = timesteps // ddim_timesteps
        self.ddim_timesteps = np.arange(1, ddim_timesteps + 1) * ratio - 1
        prev = [alpha_cumprods[0], *alpha_cumprods[self.ddim_timesteps[:-1]]]
        self.prev = torch.tensor(np.asarray(prev))
        self.ddim_timesteps = torch.tensor(self.ddim_timesteps)

    def step(self, pred_x0, pred_noise, index):
        prev = append_dims(self.prev[index], pred_x0.ndim)
        return prev.sqrt() * pred_x0 + (1 - prev).sqrt() * pred_noise


def append_dims(x, ndim):
    return x[(..., *(None,) * (ndim - x.ndim))]


def scalings_for_boundary_conditions(timestep, sigma_data=0.5, timestep_scaling=10.0):
    scaled = timestep_scaling * timestep
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2) ** 0.5
    return append_dims(c_skip, 4), append_dims(c_out, 4)


def translated(abar, kind, output, t, sample):
    """A network's output at times t [B] of the noise schedule abar -> x_0, eps."""
    alpha, sigma = append_dims(abar[t].sqrt(), 4), append_dims((1 - abar[t]).sqrt(), 4)
    if kind == 'epsilon':
        return (sample - sigma * output) / alpha, output
    return alpha * sample - sigma * output, alpha * output + sigma * sample


def nchw(*arrays):
    """NHWC arrays as torch tensors, NCHW."""
    return [torch.tensor(x).permute(0, 3, 1, 2) for x in arrays]


def adapter_gradients(unet, ab, name='student'):
    """{(path, leaf): gradient in our layout} of peft's adapter `name`."""
    parameters = dict(unet.named_parameters())
    return {
        where: np.transpose(parameters[key].grad.numpy(), np.argsort(perm))
        for where, key, perm in factors(ab, name)
    }


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)
