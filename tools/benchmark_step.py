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
import time
import zlib
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).parents[1] / 'configs' / 'default.py'
SOLVER_STEPS, TOTAL = 50, 1000
SIDES = 'lcm_jax', 'diffusers'
TARGETS = [  # of the script
    *('to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'proj_out', 'ff.net.0.proj', 'ff.net.2'),
    *('conv1', 'conv2', 'conv_shortcut', 'downsamplers.0.conv', 'upsamplers.0.conv'),
    'time_emb_proj',
]
SETTINGS = {
    'data.cache': True,  # latents and text are at hand
    'distill.distance': 'l2',
    'train.ema_decay': 0.0,
    'train.lr': 1e-4,
    'train.warmup': 0,
    'train.weight_decay': 0.01,
    'train.clip': 1.0,
}


def random(key, shape):
    """The tensor of a checkpoint's key, in its layout: variance 1 / fan-in, norms around one."""
    draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, np.float32)
    if len(shape) == 1:
        return np.float32(0.1) * draw + np.float32('norm' in key and key.endswith('weight'))
    return draw * np.float32(np.prod(shape[1:]) ** -0.5)


def condition(args, seed, n):
    """A condition of n samples."""
    rng = np.random.default_rng(seed)
    cond = {'context': rng.standard_normal((n, 77, args.width), np.float32)}
    if args.pooled:
        cond['pooled'] = rng.standard_normal((n, args.pooled), np.float32)
    return cond


def inputs(i, args):
    """What both sides are given in step i, NHWC; 'noise', 't', 's' and 'w' are our step's own draws."""
    import jax

    from lcm_jax import distill

    z = np.random.default_rng(i).standard_normal(
        (args.batch, args.side, args.side, args.channels), np.float32
    )
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), i), 3)[0]
    draws = distill.draw(
        key,
        np.arange(args.batch),
        z.shape[1:],
        steps=SOLVER_STEPS,
        total=TOTAL,
        w_range=distill.w_range('script'),
    )
    sizes = np.float32([args.size, args.size, 0, 0, args.size, args.size])
    return {
        'z': z,
        'sizes': np.tile(sizes, (args.batch, 1)),
        'cond': condition(args, 1000 + i, args.batch),
    } | {name: np.array(x) for name, x in draws._asdict().items()}


def ours(args):
    """-> step(inputs) -> loss: the trainer's own step."""
    import jax
    import jax.numpy as jnp

    from lcm_jax import aot, flags, loop, sharding, weights
    from lcm_jax.step import program
    from lcm_jax.tree import map_named
    from lcm_jax.workloads import sizes_of

    settings = SETTINGS | {
        'dtype': args.dtype,
        'lora.rank': args.rank,
        'lora.alpha': float(args.rank),
        'train.batch': args.batch,
        'train.remat': args.remat,
    }
    config = flags.read(CONFIG, settings)
    specs, family, schedule = sizes_of(args.model)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    prog = program(specs, family, schedule, config, mesh)
    batch = prog.batch((args.size, args.size))
    key = jax.random.key(0)
    compiled = aot.compiled(prog.step, prog.state, prog.frozen, batch, key, donate_argnums=0)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    print(
        f'our step: {cost["flops"] / 1e12:.2f} TFLOP (a loop counts once), '
        f'{memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries, '
        f'{memory.argument_size_in_bytes / 2**20:.0f} MiB of arguments',
        flush=True,
    )
    if args.dump:
        Path(args.dump).write_text(compiled.as_text())

    def theirs(path, x, suffix=''):
        """A parameter of ours, drawn as the checkpoint's."""
        key, perm = weights.theirs(path, x.ndim)
        drawn = random(key + suffix, tuple(x.shape[i] for i in perm))
        return jax.device_put(drawn.transpose(np.argsort(perm)).astype(x.dtype, order='C'))

    null = {k: jnp.asarray(x, args.dtype) for k, x in condition(args, 999, 1).items()}
    frozen = {'null': null, 'unet': map_named(theirs, prog.frozen['unet'])}
    lora = {
        path: {'down': theirs(path, ab['down'], '.lora_A'), 'up': jnp.zeros(ab['up'].shape)}
        for path, ab in prog.state.params.items()
    }
    state = loop.init(lora, prog.tx, 0.0)
    scaling = specs['vae'].scaling_factor

    def call(x):
        nonlocal state
        given = {
            'row': np.arange(args.batch, dtype=np.int32),
            'sizes': x['sizes'],
            'mean': x['z'] / scaling,
            'logvar': np.full_like(x['z'], -np.inf),
        }
        given |= {k: np.asarray(c, batch[k].dtype) for k, c in x['cond'].items()}
        state, metrics = compiled(state, frozen, jax.device_put(given), key)
        return float(metrics['loss'])

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
    net.add_adapter(peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS))
    trained = {k: p for k, p in net.named_parameters() if '.lora_' in k}
    for key, p in trained.items():
        if '.lora_A.' in key:
            name = key.replace('.lora_A.default.weight', '.weight.lora_A')
            p.data = torch.from_numpy(random(name, tuple(p.shape)))
    net.to(device).train()
    if args.checkpointing:
        net.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained.values(), 1e-4, weight_decay=0.01)
    run = torch.compile(net) if cuda else net
    abar = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'
    ).alphas_cumprod.to(device)
    null = tensors(condition(args, 999, 1), device)

    def expand(x):
        return x.reshape(-1, 1, 1, 1)

    def predict(z, t, cond, sizes):
        """-> x, eps."""
        added = {'text_embeds': cond['pooled'], 'time_ids': sizes} if args.pooled else None
        with torch.autocast(device, dtype, enabled=args.dtype != 'float32'):
            out = run(z, t, cond['context'], added_cond_kwargs=added).sample
        alpha, sigma = expand(abar[t].sqrt()), expand((1 - abar[t]).sqrt())
        if args.kind == 'epsilon':
            return (z - sigma * out) / alpha, out
        return alpha * z - sigma * out, alpha * out + sigma * z

    def consistency(z, t, cond, sizes):
        scaled = 10.0 * t
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return expand(c_skip) * z + expand(c_out) * predict(z, t, cond, sizes)[0]

    def call(x):
        x = tensors(x, device)
        z, noise = (x[name].movedim(-1, 1).contiguous() for name in ('z', 'noise'))
        t, s, w = x['t'].long(), x['s'].long(), expand(x['w'])
        noisy = expand(abar[t].sqrt()) * z + expand((1 - abar[t]).sqrt()) * noise
        unconditional = {name: c.expand(len(z), *c.shape[1:]) for name, c in null.items()}
        prediction = consistency(noisy, t, x['cond'], x['sizes'])
        with torch.no_grad():
            net.disable_adapters()
            (x_c, eps_c), (x_u, eps_u) = (
                predict(noisy, t, c, x['sizes']) for c in (x['cond'], unconditional)
            )
            net.enable_adapters()
            prev = expand(abar[s])
            previous = prev.sqrt() * (x_c + w * (x_c - x_u))
            previous = previous + (1 - prev).sqrt() * (eps_c + w * (eps_c - eps_u))
            target = consistency(previous, s, x['cond'], x['sizes'])
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
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
    return args


def step(args):
    """Both sides in turns, and the table."""
    import jax

    args = describe(args)
    jax.config.update('jax_platforms', 'cpu')  # this process draws; the sides have the device
    context = multiprocessing.get_context('spawn')
    sides = SIDES[: 1 + (args.peer == 'diffusers')]
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
        table[side] = (
            statistics.median(wall),
            min(wall),
            statistics.median(cpu),
            peaks[side] / 2**30,
        )
        print(f'{side:10}  ' + '  '.join(f'{x:8.3f}' for x in table[side]))
    if len(sides) == 2:
        ratio = [a / b for a, b in zip(*table.values(), strict=True)]
        print(f'{"ratio":10}  ' + '  '.join(f'{x:8.2f}' for x in ratio))
