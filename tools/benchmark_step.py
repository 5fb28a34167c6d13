"""One LCM-LoRA optimisation step of ours beside diffusers + peft: `benchmark.py step`.

Each side lives in a process of its own, which has the memory of that side alone, and the two step in
turns. Weights are random, the same for both, as are latents, text, noise, times and guidance of every
step. The peer follows diffusers' examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py
from precomputed latents and text, with one UNet for student and teacher (the script holds two): the
adapter is disabled for the teacher. Nothing here imports jax or torch before a side does.
"""

import multiprocessing
import resource
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np

SOLVER_STEPS, TOTAL = 50, 1000
W_RANGE = 5.0, 15.0
LR, CLIP, DECAY = 1e-4, 1.0, 0.01
SIDES = 'lcm_jax', 'diffusers'


def random(key, shape):
    """The tensor of a checkpoint's key, in its layout: variance 1 / fan-in, norms around one."""
    draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, np.float32)
    if len(shape) == 1:
        return np.float32(0.1) * draw + np.float32('norm' in key and key.endswith('weight'))
    return draw * np.float32(np.prod(shape[1:]) ** -0.5)


def inputs(i, args):
    """What step i of both sides is given: numpy arrays, NHWC."""
    rng = np.random.default_rng(i)
    shape = (args.batch, args.side, args.side, args.channels)
    index = rng.integers(0, SOLVER_STEPS, args.batch)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    def condition():
        cond = {'context': normal(args.batch, 77, args.width)}
        if args.pooled:
            cond['pooled'] = normal(args.batch, args.pooled)
            cond['sizes'] = np.tile(
                np.float32([args.size, args.size, 0, 0, args.size, args.size]), (args.batch, 1)
            )
        return cond

    return {
        'z': normal(*shape),
        'noise': normal(*shape),
        'index': index,
        'w': rng.uniform(*W_RANGE, args.batch).astype(np.float32),
        'cond': condition(),
        'null': condition(),
    }


def ours(args):
    """-> step(inputs) -> loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from lcm_jax import distill, lora, samplers, weights
    from lcm_jax.diffusion import schedule
    from lcm_jax.models.shapes import unet_shapes
    from lcm_jax.models.unet import UNet
    from lcm_jax.models.zoo import MODELS
    from lcm_jax.tree import map_named

    model = MODELS[args.model]
    shapes = unet_shapes(model.unet, args.dtype)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, args.rank))
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LR, weight_decay=DECAY))
    abar = schedule()

    def loss(params, base, x):
        def teacher(z, t, **cond):
            z, cond = z.astype(args.dtype), {k: c.astype(args.dtype) for k, c in cond.items()}
            return UNet(model.unet).apply({'params': base}, z, t, **cond)

        student = lora.apply(teacher, params, 1.0)
        k = TOTAL // SOLVER_STEPS
        t = k * (x['index'] + 1) - 1
        draws = distill.Draws(x['noise'], t, jnp.maximum(t - k, 0), x['w'])
        return distill.lcm_loss(
            student,
            student,
            teacher,
            x,
            draws,
            abar,
            solver=samplers.ddim(),
            kind=model.prediction_type,
            distance='l2',
            huber_c=0.001,
        )

    def step(state, base, x):
        params, opt = state
        value, grads = jax.value_and_grad(loss)(params, base, x)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    abstract = adapter, jax.eval_shape(tx.init, adapter)
    compiled = jax.jit(step, donate_argnums=0).lower(abstract, shapes, inputs(0, args)).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    print(
        f'our step: {cost["flops"] / 1e12:.2f} TFLOP (a loop counts once), '
        f'{memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries, '
        f'{memory.argument_size_in_bytes / 2**20:.0f} MiB of arguments',
        flush=True,
    )
    if args.dump:
        Path(args.dump).write_text(compiled.as_text())

    def theirs(path, x, name=None):
        """A parameter of ours, drawn as the checkpoint's."""
        key, perm = weights.theirs(path, x.ndim)
        drawn = random(name or key, tuple(x.shape[i] for i in perm))
        return jax.device_put(drawn.transpose(np.argsort(perm)).astype(x.dtype, order='C'))

    base = map_named(theirs, shapes)
    state = {
        path: {
            'down': theirs(path, ab['down'], weights.theirs(path, ab['down'].ndim)[0] + '.lora_A'),
            'up': jnp.zeros(ab['up'].shape),
        }
        for path, ab in adapter.items()
    }
    state = state, tx.init(state)

    def call(x):
        nonlocal state
        state, value = compiled(state, base, x)
        return float(value)

    return call


def peer(args):
    """-> step(inputs) -> loss, as the script has it."""
    import diffusers
    import peft
    import torch

    cuda = torch.cuda.is_available()
    device, dtype = 'cuda' if cuda else 'cpu', getattr(torch, args.dtype)
    net = diffusers.UNet2DConditionModel(**args.config).requires_grad_(False)
    for key, p in net.named_parameters():
        p.data = torch.from_numpy(random(key, tuple(p.shape))).to(dtype)
    net.add_adapter(
        peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=args.targets)
    )
    trained = {k: p for k, p in net.named_parameters() if '.lora_' in k}
    for key, p in trained.items():
        if '.lora_A.' in key:
            name = key.replace('.lora_A.default.weight', '.weight.lora_A')
            p.data = torch.from_numpy(random(name, tuple(p.shape)))
    net.to(device).train()
    if args.checkpointing:
        net.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained.values(), LR, weight_decay=DECAY)
    run = torch.compile(net) if cuda else net
    abar = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'
    ).alphas_cumprod.to(device)
    k = TOTAL // SOLVER_STEPS

    def expand(x):
        return x.reshape(-1, 1, 1, 1)

    def predict(z, t, cond):
        """-> x, eps."""
        added = {'text_embeds': cond['pooled'], 'time_ids': cond['sizes']} if args.pooled else None
        with torch.autocast(device, dtype, enabled=args.dtype != 'float32'):
            out = run(z, t, cond['context'], added_cond_kwargs=added).sample
        alpha, sigma = expand(abar[t].sqrt()), expand((1 - abar[t]).sqrt())
        if args.kind == 'epsilon':
            return (z - sigma * out) / alpha, out
        return alpha * z - sigma * out, alpha * out + sigma * z

    def consistency(z, t, cond):
        scaled = 10.0 * t
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return expand(c_skip) * z + expand(c_out) * predict(z, t, cond)[0]

    def call(x):
        x = {name: tensors(value, device) for name, value in x.items()}
        z, noise = (x[name].movedim(-1, 1).contiguous() for name in ('z', 'noise'))
        t = k * (x['index'] + 1) - 1
        s, w = (t - k).clamp(min=0), expand(x['w'])
        noisy = expand(abar[t].sqrt()) * z + expand((1 - abar[t]).sqrt()) * noise
        prediction = consistency(noisy, t, x['cond'])
        with torch.no_grad():
            net.disable_adapters()
            (x_c, eps_c), (x_u, eps_u) = (predict(noisy, t, x[name]) for name in ('cond', 'null'))
            net.enable_adapters()
            prev = expand(abar[s])
            previous = prev.sqrt() * (x_c + w * (x_c - x_u))
            previous = previous + (1 - prev).sqrt() * (eps_c + w * (eps_c - eps_u))
            target = consistency(previous, s, x['cond'])
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return call


def tensors(x, device):
    import torch

    if isinstance(x, dict):
        return {k: tensors(v, device) for k, v in x.items()}
    return torch.from_numpy(x).to(device)


def serve(pipe, side, args):
    """A side's process: answers inputs with (loss, wall seconds, CPU seconds), None with its peaks."""
    step = {'lcm_jax': ours, 'diffusers': peer}[side](args)
    pipe.send('ready')
    while x := pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(x)
        pipe.send((loss, time.perf_counter() - wall, time.process_time() - cpu))
    pipe.send(peak(side))


def peak(side):
    """Peak memory so far, bytes: the device's, or the whole process's where that is a CPU."""
    if side == 'lcm_jax':
        import jax

        stats = jax.devices()[0].memory_stats() if jax.default_backend() != 'cpu' else None
        if stats:
            return stats['peak_bytes_in_use']
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(args):
    """args with what the sides need to know of the model, and the peer not from us."""
    from lcm_jax.models import configs
    from lcm_jax.models.zoo import MODELS

    model = MODELS[args.model]
    args.side = args.size // model.vae.factor
    args.channels, args.width = model.unet.in_channels, model.unet.context_dim
    args.pooled, args.kind = model.unet.pooled_dim, model.prediction_type
    args.config = configs.unet_config(model.unet, args.side)
    args.targets = (
        'to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut '
        'downsamplers.0.conv upsamplers.0.conv time_emb_proj'
    ).split()
    return args


def step(args):
    """Both sides in turns, and the table."""
    args = describe(args)
    context = multiprocessing.get_context('spawn')
    sides = SIDES[: 1 + (args.peer == 'diffusers')]
    if args.peer == 'only':
        sides = SIDES[1:]
    pipes, processes = {}, []
    for side in sides:
        pipes[side], end = context.Pipe()
        processes.append(context.Process(target=serve, args=(end, side, args), daemon=True))
        processes[-1].start()
        end.close()
    for pipe in pipes.values():
        pipe.recv()
    rows = {side: [] for side in sides}
    for i in range(args.repeat + 1):
        x = inputs(i, args)
        for side, pipe in pipes.items():
            pipe.send(x)
            rows[side].append(pipe.recv())
    peaks = {}
    for side, pipe in pipes.items():
        pipe.send(None)
        peaks[side] = pipe.recv()
    for process in processes:
        process.join()
    if len(sides) == 2:
        both = [[loss for loss, *_ in rows[side]] for side in sides]
        errors = [f'{abs(a - b) / b:.1e}' for a, b in zip(*both, strict=True)]
        print(f'relative differences of the losses, step by step: {" ".join(errors)}')
    print(f'{"":10}  {"median s":>8}  {"least s":>8}  {"CPU s":>8}  {"GiB":>8}')
    table = {}
    for side in sides:
        _, wall, cpu = zip(*rows[side][1:], strict=True)
        table[side] = statistics.median(wall), min(wall), statistics.median(cpu), peaks[side] / 2**30
        print(f'{side:10}  ' + '  '.join(f'{x:8.3f}' for x in table[side]))
    if len(sides) == 2:
        ratio = [a / b for a, b in zip(*table.values(), strict=True)]
        print(f'{"ratio":10}  ' + '  '.join(f'{x:8.2f}' for x in ratio))
    sys.stdout.flush()
