"""The verb `lcm-jax plan`: what a training step or the sampler asks of devices, here or not."""

import math

from lcm_jax import flags

PROGRAMS = ('train', 'sample')
GIB = 2**30
KINDS = {  # of memory: what each is
    'step': 'counters',
    'skipped': 'counters',
    'params': 'parameters',
    'ema': 'their average',
    'opt': "optimizer's moments",
    'frozen': 'frozen networks, null condition',
    'batch': 'batch',
    'rows': 'noise, text embeddings',
    'inputs': 'inputs',
    'key': 'random key',
    'layout': 'padding of the above',
    'results': 'results',
    'temporaries': 'temporaries: activations, gradients',
    'code': 'code',
}


def show(r, name):
    """Report -> text."""

    def gib(n):
        return f'{n / GIB:8.3f} GiB'

    lines = [
        f'{name}: {r.devices} devices, {r.samples} samples a call',
        '',
        'memory of each device',
    ]
    groups = {}
    for kind, size in r.memory.items():
        groups[KINDS[kind]] = groups.get(KINDS[kind], 0) + size
    lines += [f'  {gib(size)}  {kind}' for kind, size in groups.items() if size >= GIB / 2000]
    lines += [f'  {gib(r.needed)}  in all, of {r.chip.memory / GIB:.2f} GiB', '']
    if r.cost:
        lines += [
            f'work of each device: {r.flops / 1e12:.4g} TFLOP in products and convolutions '
            f"(the compiler's count outside custom kernels: {r.cost.flops / 1e12:.4g}), "
            f'{r.cost.bytes_accessed / 1e9:.4g} GB moved',
            roofline(r),
            '',
            'sent between devices' if r.collectives else 'nothing is sent between devices',
        ]
        lines += [
            f'  {c.bytes / 2**20:10.1f} MiB  {c.count:5} x {c.kind} along {", ".join(c.axes) or "none"}'
            for c in r.collectives
        ]
        lines += ['', f'compiled in {r.cost.seconds:.0f} s']
    lines.append(verdict(r))
    return '\n'.join(lines)


def roofline(r):
    """Report -> what its device's peaks allow, in words."""
    work, traffic = r.seconds
    slowest = max(work, traffic)
    if math.isnan(slowest):
        return 'roofline: not known, as the peaks of this device are not'
    return (
        f'roofline: {work:.4g} s of arithmetic, {traffic:.4g} s of memory traffic: at most '
        f'{r.samples / slowest:.1f} samples/s, {r.samples / slowest / r.devices:.2f} a device'
    )


def verdict(r):
    """Report -> whether the program fits, in words."""
    if math.isnan(r.spare):
        return 'whether it fits is not known: this device does not say what memory it has'
    size = f'{abs(r.spare) / GIB:.2f} GiB'
    return f'fits, with {size} to spare' if r.spare >= 0 else f'DOES NOT FIT: {size} too much'


def plan(args):
    import jax

    from lcm_jax import chips, plan, sharding, step, workloads
    from lcm_jax.models.shapes import DTYPES

    jax.config.update(
        'jax_enable_compilation_cache', False
    )  # it cannot read those of chips elsewhere
    config, *_ = flags.settled(args, 'train')
    model, size = workloads.sizes_of(config.model), (config.data.resolution,) * 2
    axes = ('data', 'fsdp', 'tensor', 'dcn')
    mesh = sharding.make_mesh(
        **{axis: config.mesh[axis] for axis in axes}, devices=chips.devices_of(args.topology)
    )
    if args.program == 'train':
        program = workloads.training(step.program(*model, config, mesh), size, mesh)
    else:
        dtypes = (DTYPES[config[key]] for key in ('dtype', 'vae_dtype'))
        program = workloads.sampling(model, size, mesh, *dtypes)
    report = plan.report(program)
    print(show(report, f'{args.program} {config.model} at {size[0]} px on {args.topology}'))


def add(verb):
    """Add `plan` to the parser; verb(run, name, text) adds one."""
    p = verb(plan, 'plan', 'say what a config asks of devices that need not be here')
    flags.add_config(p, 'train', 'configs/sdxl_lcm_lora.py')
    p.add_argument(
        '--topology', required=True, help="such as v5e:4x4, or 2*v5e:16x16; 'local': what is here"
    )
    p.add_argument('--program', default='train', choices=PROGRAMS, help='default: train')
