"""Loss and gradients of every objective but LCM-LoRA's (test_distill.py) against diffusers + peft.

Each torch function follows a script of diffusers step by step on our draws; latent consistency
fine-tuning has none and follows the LCM paper's section 4.4. The teacher's solvers are compared with
diffusers' DPMSolverSinglestepScheduler.
"""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from objectives import (
    ALPHA,
    HUBER_C,
    KINDS,
    RANK,
    SPEC,
    TOLERANCE,
    DDIMSolver,
    adapter,
    adapter_gradients,
    append_dims,
    base,
    batch_and_draws,
    nchw,
    peer,
    random,
    randomised,
    relative,
    scalings_for_boundary_conditions,
    translated,
    unet_peer,
)

from lcm_jax import lora, weights
from lcm_jax.conditioning import guidance_embedding
from lcm_jax.diffusion import Pred, alpha_sigma, denoiser, schedule
from lcm_jax.distill import DISTANCES, Nets, Noise, denoise, lcf, lcm
from lcm_jax.models.shapes import unet_shapes
from lcm_jax.models.unet import UNet
from lcm_jax.samplers import ODE_STEPS
from lcm_jax.tree import named

W_DIM = 8
PAIRS = [*zip(KINDS, reversed(DISTANCES), strict=True)]  # each with each is in test_distill.py
GUIDED = dataclasses.replace(SPEC, w_dim=W_DIM)
# What train_text_to_image_lora.py adapts: its words, and ours.
ATTENTION = ['to_k', 'to_q', 'to_v', 'to_out.0'], r'.*(to_k|to_q|to_v|to_out\.0)/kernel'
NOISE = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}


@functools.cache
def guided_unet(seed):
    return randomised(unet_shapes(GUIDED), seed)


@functools.cache
def attention_adapter(seed):
    make = functools.partial(lora.init, params=base(), rank=RANK, targets=ATTENTION[1])
    return randomised(jax.eval_shape(make, jax.random.key(0)), seed)


def net_of(params, spec=SPEC, **more):
    return lambda z, t, **cond: UNet(spec).apply({'params': params}, z, t, **cond, **more)


def adapted(ab):
    return lora.apply(net_of(base()), ab, ALPHA / RANK)


def by_path(tree):
    """A gradient -> {(path,) or (path, leaf): array}."""
    if all(isinstance(x, dict) and x.keys() == {'down', 'up'} for x in tree.values()):
        return {(path, leaf): x for path, ab in tree.items() for leaf, x in ab.items()}
    return {(path,): x for path, x in named(tree)}


def unet_gradients(unet, params):
    """{(path,): gradient in our layout} of all of a diffusers UNet's parameters."""
    found, out = dict(unet.named_parameters()), {}
    for path, x in named(params):
        key, perm = weights.theirs(path, x.ndim)
        out[path,] = np.transpose(found[key].grad.numpy(), np.argsort(perm))
    assert len(out) == len(found)
    return out


def compare(what, ours, theirs):
    """ours: loss, gradient tree; theirs: loss, {where: gradient}. Fails above TOLERANCE."""
    (loss, gradient), (want_loss, want) = ours, theirs
    gradient = by_path(gradient)
    assert gradient.keys() == want.keys() and want_loss > 0
    errors = {where: relative(np.asarray(gradient[where]), g) for where, g in want.items()}
    worst = max(errors, key=errors.get)
    difference = abs(float(loss) - want_loss) / want_loss
    print(
        f'{what}: loss {want_loss:.6g}, relative difference {difference:.1e}; {len(errors)} '
        f'gradients, largest {errors[worst]:.1e} at {"/".join(worst)}'
    )
    assert difference < TOLERANCE
    assert errors[worst] < TOLERANCE


def apart(distance, prediction, target):
    if distance == 'l2':
        return F.mse_loss(prediction, target)
    return torch.mean(torch.sqrt((prediction - target) ** 2 + HUBER_C**2) - HUBER_C)


# --- full LCM with guidance embedding: train_lcm_distill_sd_wds.py


def lcm_script(kind, distance, student, target):
    unet, target_unet = (unet_peer(GUIDED, params) for params in (student, target))
    teacher_unet = unet_peer(SPEC, base())
    batch, draws, index = batch_and_draws()
    latents, noise = nchw(batch['z'], draws.noise)
    w, index = torch.tensor(draws.w), torch.tensor(index)
    cond, null = (torch.tensor(batch[k]['context']) for k in ('cond', 'null'))
    noise_scheduler = diffusers.DDIMScheduler(**NOISE)
    abar = noise_scheduler.alphas_cumprod
    solver = DDIMSolver(abar.numpy())
    predicted = functools.partial(translated, abar, kind)

    start_timesteps = solver.ddim_timesteps[index]
    timesteps = start_timesteps - 1000 // 50
    timesteps = torch.where(timesteps < 0, torch.zeros_like(timesteps), timesteps)
    c_skip_start, c_out_start = scalings_for_boundary_conditions(start_timesteps)
    c_skip, c_out = scalings_for_boundary_conditions(timesteps)
    noisy = noise_scheduler.add_noise(latents, noise, start_timesteps)
    w_embedding = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, w, embedding_dim=W_DIM
    )
    w = append_dims(w, 4)
    output = unet(noisy, start_timesteps, cond, timestep_cond=w_embedding).sample
    pred_x0, _ = predicted(output, start_timesteps, noisy)
    model_pred = c_skip_start * noisy + c_out_start * pred_x0
    with torch.no_grad():
        cond_x0, cond_noise = predicted(
            teacher_unet(noisy, start_timesteps, cond).sample, start_timesteps, noisy
        )
        null_x0, null_noise = predicted(
            teacher_unet(noisy, start_timesteps, null).sample, start_timesteps, noisy
        )
        x0 = cond_x0 + w * (cond_x0 - null_x0)
        eps = cond_noise + w * (cond_noise - null_noise)
        x_prev = solver.step(x0, eps, index)
        output = target_unet(x_prev, timesteps, cond, timestep_cond=w_embedding).sample
        x0, _ = predicted(output, timesteps, x_prev)
        goal = c_skip * x_prev + c_out * x0
    loss = apart(distance, model_pred, goal)
    loss.backward()
    return loss.item(), unet_gradients(unet, student)


@pytest.mark.parametrize(('kind', 'distance'), PAIRS)
def test_full_lcm_with_guidance_embedding(kind, distance):
    batch, draws, _ = batch_and_draws()
    student, target = guided_unet(1), guided_unet(2)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        w = guidance_embedding(draws.w, W_DIM)
        nets = (net_of(p, GUIDED, w=w) for p in (params, target))
        return lcm(
            Nets(*nets, net_of(base())),
            batch,
            draws,
            Noise(schedule(), kind),
            solver='ddim',
            distance=distance,
            huber_c=HUBER_C,
        ).mean()

    compare(
        f'full LCM, {kind}, {distance}', ours(student), lcm_script(kind, distance, student, target)
    )


# --- plain denoising: train_text_to_image_lora.py and train_text_to_image.py


def denoising_script(kind, snr_gamma, unet):
    """-> the loss, differentiated."""
    batch, draws, _ = batch_and_draws()
    latents, noise = nchw(batch['z'], draws.noise)
    timesteps = torch.tensor(draws.t)
    noise_scheduler = diffusers.DDPMScheduler(**NOISE, prediction_type=kind)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    target = noise
    if kind == 'v_prediction':
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, torch.tensor(batch['cond']['context'])).sample
    if not snr_gamma:
        loss = F.mse_loss(model_pred, target, reduction='mean')
    else:
        snr = compute_snr(noise_scheduler, timesteps)
        weight = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        weight = weight / (snr if kind == 'epsilon' else snr + 1)
        loss = F.mse_loss(model_pred, target, reduction='none')
        loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weight).mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize(
    ('trains', 'kind', 'min_snr'),
    [
        ('lora', 'epsilon', 5.0),
        ('lora', 'v_prediction', 0.0),
        ('full', 'epsilon', 0.0),
        ('full', 'v_prediction', 5.0),
    ],
)
def test_denoising(trains, kind, min_snr):
    batch, draws, _ = batch_and_draws()
    params, bind = {
        'lora': lambda: (attention_adapter(1), adapted),
        'full': lambda: (base(), net_of),
    }[trains]()

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        nets = Nets(bind(params), None, None)
        return denoise(nets, batch, draws, Noise(schedule(), kind), min_snr=min_snr).mean()

    if trains == 'lora':
        unet = peer({'student': params}, ATTENTION[0])
        want = denoising_script(kind, min_snr, unet), adapter_gradients(unet, params)
    else:
        unet = unet_peer(SPEC, params)
        want = denoising_script(kind, min_snr, unet), unet_gradients(unet, params)
    compare(f'denoising, {trains}, {kind}, min_snr {min_snr}', ours(params), want)


# --- latent consistency fine-tuning


def lcf_reference(kind, distance, student, target):
    """Section 4.4: the same latents and the same noise at both times; no teacher."""
    unet = peer({'student': student, 'target': target})
    batch, draws, _ = batch_and_draws()
    latents, noise = nchw(batch['z'], draws.noise)
    cond, noise_scheduler = torch.tensor(batch['cond']['context']), diffusers.DDIMScheduler(**NOISE)

    def f(name, t):
        unet.set_adapter(name)
        z = noise_scheduler.add_noise(latents, noise, t)
        x0, _ = translated(noise_scheduler.alphas_cumprod, kind, unet(z, t, cond).sample, t, z)
        c_skip, c_out = scalings_for_boundary_conditions(t)
        return c_skip * z + c_out * x0

    with torch.no_grad():
        goal = f('target', torch.tensor(draws.s))
    loss = apart(distance, f('student', torch.tensor(draws.t)), goal)
    loss.backward()
    return loss.item(), adapter_gradients(unet, student)


@pytest.mark.parametrize(('kind', 'distance'), PAIRS)
def test_consistency_fine_tuning(kind, distance):
    batch, draws, _ = batch_and_draws()
    student, target = adapter(1), adapter(2)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        return lcf(
            Nets(adapted(params), adapted(target), None),
            batch,
            draws,
            Noise(schedule(), kind),
            distance=distance,
            huber_c=HUBER_C,
        ).mean()

    compare(
        f'LCF, {kind}, {distance}', ours(student), lcf_reference(kind, distance, student, target)
    )


# --- the teacher's solvers


def output(z, t):
    """A network, for numpy and torch alike."""
    return z * 0.3 + (t / 1000 - 0.4) * z**2 / (1 + z**2)


def singlestep(algorithm, kind, z, t, u, s):
    """diffusers' two updates from time t: to u, and from there on to s. -> z_s [h,w,C]"""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **NOISE, prediction_type=kind, algorithm_type=algorithm, final_sigmas_type='sigma_min'
    )
    scheduler.set_timesteps(4)  # sets it up; the times that count come next
    abar = scheduler.alphas_cumprod.double()
    scheduler.sigmas = ((1 - abar) / abar).sqrt()[[t, u, s]]
    scheduler._step_index = 0
    z = torch.tensor(z, dtype=torch.float64)
    first = scheduler.convert_model_output(output(z, t), sample=z)
    z_u = scheduler.dpm_solver_first_order_update(first, sample=z)
    scheduler._step_index = 1
    second = scheduler.convert_model_output(output(z_u, u), sample=z_u)
    return scheduler.singlestep_dpm_solver_second_order_update([first, second], sample=z).numpy()


def midpoint(t, s):
    """The whole time whose log-SNR is nearest to the middle of the step's."""
    abar = np.asarray(schedule(), np.float64)
    lam = 0.5 * np.log(abar / (1 - abar))
    return int(np.abs(lam - (lam[t] + lam[s]) / 2).argmin())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('solver', 'algorithm'), [('dpm', 'dpmsolver'), ('dpm++', 'dpmsolver++')])
@pytest.mark.parametrize('apart', [20, 2, 1])
def test_second_order_steps_are_diffusers_singlestep(solver, algorithm, kind, apart):
    """With no whole time between t and s, the middle is s."""
    t = np.array([999, 519, 259, 59, 19])
    s = np.maximum(t - apart, 0)
    u = [midpoint(*pair) if apart > 1 else pair[1] for pair in zip(t, s, strict=True)]
    assert all(a > b >= c for a, b, c in zip(t, u, s, strict=True))
    z = random(5, len(t), 4, 4, 4)
    model = denoiser(lambda z, t: output(z, t[:, None, None, None]), kind, schedule())
    got = ODE_STEPS[solver](model, z, jnp.asarray(t), jnp.asarray(s), schedule())
    want = [singlestep(algorithm, kind, *row) for row in zip(z, t, u, s, strict=True)]
    error = np.abs(got - np.stack(want)).max() / np.abs(want).max()
    print(f'{solver}, {kind}: largest difference {error:.1e} of the largest value')
    assert error < 1e-4


@pytest.mark.parametrize('solver', ODE_STEPS)
def test_steps_between_neighbouring_times_are_finite(solver):
    """All of them, and the step from 0 to 0, which changes nothing."""
    t = jnp.arange(1000)
    z = random(5, len(t), 1, 1, 2)
    model = denoiser(lambda z, t: output(z, t[:, None, None, None]), 'epsilon', schedule())
    got = np.asarray(ODE_STEPS[solver](model, z, t, jnp.maximum(t - 1, 0), schedule()))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[0], z[0], rtol=1e-5)


@pytest.mark.parametrize(('solver', 'order'), [('ddim', 1), ('dpm', 2), ('dpm++', 2)])
def test_order_of_the_solvers(solver, order):
    """One step's error on a Gaussian's ODE, whose solution is known, falls by 2^(order+1) or so.

    Data of variance 0.25: E[x | z] = 0.25 alpha z / v, v = 0.25 alpha^2 + sigma^2, and the ODE keeps
    z / sqrt(v).
    """
    abar = schedule()

    def v(t):
        alpha, sigma = alpha_sigma(abar, t, 4)
        return 0.25 * alpha**2 + sigma**2

    def model(z, t):
        alpha, sigma = alpha_sigma(abar, t, 4)
        return Pred(0.25 * alpha * z / v(t), sigma * z / v(t))

    z = random(6, 1, 2, 2, 4)
    t, errors = jnp.array([699]), []
    for k in (320, 160):
        got = ODE_STEPS[solver](model, z, t, t - k, abar)
        errors.append(float(jnp.abs(got - z * jnp.sqrt(v(t - k) / v(t))).max()))
    print(f'{solver}: errors {errors[0]:.1e} and {errors[1]:.1e}')
    assert errors[0] / errors[1] > 0.8 * 2 ** (order + 1)
