"""The LCM loss and its LoRA gradients against diffusers' UNet, peft, and its script's arithmetic.

The torch side follows diffusers' examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py
step by step, on the same draws; for SDXL's inputs train_lcm_distill_lora_sdxl_wds.py.
"""

import functools
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objectives import (
    ALPHA,
    HUBER_C,
    KINDS,
    RANK,
    SPEC,
    TOLERANCE,
    XL,
    DDIMSolver,
    adapter,
    adapter_gradients,
    append_dims,
    base,
    batch_and_draws,
    peer,
    random,
    relative,
    scalings_for_boundary_conditions,
    translated,
)

from lcm_jax import lora
from lcm_jax.diffusion import schedule
from lcm_jax.distill import DISTANCES, Nets, Noise, consistency, draw, lcm, w_range
from lcm_jax.errors import InputError
from lcm_jax.models.unet import UNet


def ours(kind, distance, spec=SPEC):
    """-> jitted (student adapter, target adapter) -> loss, gradient by the student's."""
    batch, draws, _ = batch_and_draws(spec)

    def teacher(z, t, context, **cond):
        return UNet(spec).apply({'params': base(spec)}, z, t, context, **cond)

    def loss(student, target):
        nets = (lora.apply(teacher, ab, ALPHA / RANK) for ab in (student, target))
        return lcm(
            Nets(*nets, teacher),
            batch,
            draws,
            Noise(schedule(), kind),
            solver='ddim',
            distance=distance,
            huber_c=HUBER_C,
        ).mean()

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def compiled(kind, distance, spec):
    return ours(kind, distance, spec)


def told(cond):
    """A condition of ours -> arguments of diffusers' UNet."""
    cond = {k: torch.tensor(x) for k, x in cond.items()}
    told = {'encoder_hidden_states': cond['context']}
    if 'pooled' in cond:
        added = {'text_embeds': cond['pooled'], 'time_ids': cond['sizes']}
        told['added_cond_kwargs'] = added
    return told


def theirs(kind, distance, student, target, spec=SPEC):
    """The script's steps 2 to 11 -> loss, {(path, leaf): gradient in our layout}."""
    adapters = {'student': student} | ({} if target is student else {'target': target})
    unet = peer(adapters, spec=spec)
    batch, draws, index = batch_and_draws(spec)
    latents, noise, w = (torch.tensor(x) for x in (batch['z'], draws.noise, draws.w))
    latents, noise = (x.permute(0, 3, 1, 2) for x in (latents, noise))
    w, index = append_dims(w, 4), torch.tensor(index)
    cond, null = (told(batch[k]) for k in ('cond', 'null'))

    noise_scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'
    )
    abar = noise_scheduler.alphas_cumprod
    solver = DDIMSolver(abar.numpy())
    start_timesteps = solver.ddim_timesteps[index]
    timesteps = start_timesteps - 1000 // 50
    timesteps = torch.where(timesteps < 0, torch.zeros_like(timesteps), timesteps)
    c_skip_start, c_out_start = scalings_for_boundary_conditions(start_timesteps)
    c_skip, c_out = scalings_for_boundary_conditions(timesteps)

    predicted = functools.partial(translated, abar, kind)
    noisy = noise_scheduler.add_noise(latents, noise, start_timesteps)
    unet.set_adapter('student')
    pred_x0, _ = predicted(unet(noisy, start_timesteps, **cond).sample, start_timesteps, noisy)
    model_pred = c_skip_start * noisy + c_out_start * pred_x0
    with torch.no_grad():
        unet.disable_adapters()  # the teacher
        cond_x0, cond_noise = predicted(
            unet(noisy, start_timesteps, **cond).sample, start_timesteps, noisy
        )
        null_x0, null_noise = predicted(
            unet(noisy, start_timesteps, **null).sample, start_timesteps, noisy
        )
        x0 = cond_x0 + w * (cond_x0 - null_x0)
        eps = cond_noise + w * (cond_noise - null_noise)
        x_prev = solver.step(x0, eps, index)
        unet.enable_adapters()
        unet.set_adapter('student' if target is student else 'target')
        x0, _ = predicted(unet(x_prev, timesteps, **cond).sample, timesteps, x_prev)
        goal = c_skip * x_prev + c_out * x0
    unet.set_adapter('student')
    if distance == 'l2':
        loss = F.mse_loss(model_pred, goal)
    else:
        loss = torch.mean(torch.sqrt((model_pred - goal) ** 2 + HUBER_C**2) - HUBER_C)
    loss.backward()
    return loss.item(), adapter_gradients(unet, student)


@pytest.mark.parametrize(
    ('kind', 'distance', 'target', 'spec'),
    [
        *itertools.product(KINDS, DISTANCES, ('student', 'ema'), (SPEC,)),
        ('epsilon', 'huber', 'ema', XL),
    ],
)
def test_loss_and_gradients_are_the_reference_scripts(kind, distance, target, spec):
    student = adapter(1, spec)
    goal = student if target == 'student' else adapter(2, spec)
    loss, gradient = compiled(kind, distance, spec)(student, goal)
    want_loss, want = theirs(kind, distance, student, goal, spec)
    assert len(want) == 2 * len(student)
    errors = [relative(gradient[path][leaf], g) for (path, leaf), g in want.items()]
    difference = abs(float(loss) - want_loss) / want_loss
    print(
        f'{kind}, {distance}, target = {target}, pooled text {spec.pooled_dim}: loss {want_loss:.6g}, '
        f'relative difference {difference:.1e}; {len(errors)} gradients, largest {max(errors):.1e}'
    )
    assert difference < TOLERANCE
    assert max(errors) < TOLERANCE


def test_no_gradient_reaches_the_target():
    batch, draws, _ = batch_and_draws()

    def net(scale):
        return lambda z, t, context: scale * jnp.tanh(z + context.mean())

    def loss(student, target, teacher):
        return lcm(
            Nets(*map(net, (student, target, teacher))),
            batch,
            draws,
            Noise(schedule(), 'epsilon'),
            solver='dpm',
            distance='l2',
            huber_c=0,
        ).mean()

    student, target, teacher = jax.jit(jax.grad(loss, (0, 1, 2)))(1.0, 1.0, 1.0)
    assert student != 0 and target == 0 and teacher == 0


def test_the_consistency_function_is_the_identity_at_time_zero():
    z = random(0, 2, 4, 4, 4)
    f = consistency(lambda z, t: 7 * z, 'epsilon', schedule())
    np.testing.assert_array_equal(f(z, jnp.zeros(2, jnp.int32)), z)


@functools.cache
def many_draws():
    """-> draws of samples 0..3999."""
    return drawn(np.arange(4000))


@functools.partial(jax.jit, static_argnames=('steps', 'skip'))
def drawn(indices, steps=50, skip=0, key=0):
    key = jax.random.key(key)
    w = (5.0, 15.0)
    return draw(key, indices, (2, 2, 4), steps=steps, total=1000, w_range=w, skip=skip)


def test_draws_cover_the_solver_times_and_the_guidance_range():
    draws = many_draws()
    assert sorted(set(draws.t.tolist())) == list(range(19, 1000, 20))
    np.testing.assert_array_equal(draws.s, np.maximum(draws.t - 20, 0))
    assert draws.s[draws.t == 19].tolist() == [0] * int((draws.t == 19).sum())
    assert 5 <= draws.w.min() < 5.1 and 14.9 < draws.w.max() < 15
    assert abs(draws.w.mean() - 10) < 0.2 and abs(draws.t.mean() - 509) < 15
    assert abs(draws.noise.mean()) < 0.01 and abs(draws.noise.std() - 1) < 0.01
    few = drawn(np.arange(4000), steps=4)
    assert sorted(set(few.t.tolist())) == [249, 499, 749, 999]
    assert sorted(set(few.s.tolist())) == [0, 249, 499, 749]
    far = drawn(np.arange(4000), skip=60)
    np.testing.assert_array_equal(far.t, draws.t)
    np.testing.assert_array_equal(far.s, np.maximum(draws.t - 60, 0))


def test_a_samples_draw_is_its_own():
    """Whatever the batch around it, and another one with another key."""
    some = np.array([17, 3, 3999])
    same = jax.tree.map(lambda x: x[some], many_draws())
    jax.tree.map(np.testing.assert_array_equal, drawn(some), same)
    assert np.abs(drawn(some, key=1).noise - drawn(some).noise).min() > 0
    noise = many_draws().noise.reshape(4000, -1)
    assert len(np.unique(noise[:, 0])) > 3990


@pytest.mark.parametrize('steps', [0, 1001])
def test_solver_steps_out_of_range_are_refused(steps):
    with pytest.raises(InputError, match=f'{steps} solver steps; a schedule of 1000 times'):
        drawn(np.arange(2), steps=steps)


@pytest.mark.parametrize('skip', [-20, 30, 1020])
def test_skips_that_lead_to_no_solver_time_are_refused(skip):
    with pytest.raises(InputError, match=f'skip = {skip}; give a multiple of 20'):
        drawn(np.arange(2), skip=skip)


def test_unknown_names_are_refused():
    nets, noise = Nets(None, None, None), Noise(schedule(), 'epsilon')
    for changes, said in (
        ({'distance': 'hubert'}, r"unknown distance 'hubert' \(did you mean 'huber'\?\)"),
        ({'solver': 'euler'}, "unknown solver 'euler'; one of: ddim, dpm, dpm\\+\\+"),
    ):
        with pytest.raises(InputError, match=said):
            lcm(
                nets,
                {},
                None,
                noise,
                **{'distance': 'l2', 'solver': 'ddim', 'huber_c': 0, **changes},
            )


def test_guidance_ranges():
    assert (
        w_range('paper') == (2, 14) and w_range('7.5') == (7.5, 7.5) and w_range('3:15') == (3, 15)
    )
    for bad in ('', 'papers', '5:3', '-1:3', 'nan', '1:2:3'):
        with pytest.raises(InputError, match='give W, LOW:HIGH or one of paper, report, script'):
            w_range(bad)
