"""The verbs `lcm-jax evaluate`, `measure` and `sweep`: what each takes, and which function does it."""

from lcm_jax import flags


def evaluate(args):
    from lcm_jax.evaluate import start

    start(*flags.settled(args, 'ways'))


def measure(args):
    import numpy as np

    from lcm_jax.measure import compare

    found = compare(args.real, args.fake, args.features, args.resolution)
    print(f'FID {found["fid"]:.4f}')
    spread = '' if found['kid_std'] is None else f' +- {found["kid_std"]:.6f}'
    print(f'KID {found["kid"]:.6f}{spread}')
    fake, real = (f'{found[which]:,} of {getattr(args, which)}' for which in ('fake', 'real'))
    print(f'{fake} against {real}; features {found["features"]}')
    if found['biased']:
        print('with fewer than 10,000 pictures of each, FID is biased upwards; KID is not')
    for file, statistics in zip((args.save_real, args.save_fake), found['statistics'], strict=True):
        if file:
            with open(file, 'wb') as out:
                np.savez(out, **statistics.arrays())
            print(f'wrote {file}')


def sweep(args):
    from lcm_jax.grid import save
    from lcm_jax.sweep import sweep

    picture, lines = sweep(
        args.prompt,
        model=args.model,
        lora=args.lora,
        also=args.also,
        scales=args.scales,
        guidance=args.guidance,
        steps=args.steps,
        sampler=args.sampler,
        seed=args.seed,
        clip=args.clip,
    )
    save(picture, args.out)
    print('\n'.join([*lines, f'wrote {args.out}']))


def add(verb):
    """Add the verbs to the parser; verb(run, name, text) adds one."""
    p = verb(evaluate, 'evaluate', 'measure ways of drawing: FID, CLIP score, LPIPS, seconds')
    flags.add_run(p, 'ways')

    p = verb(measure, 'measure', 'FID and KID of two sets of pictures')
    text = 'pictures:DIR, folder:DIR, emoji, wds:PATTERN, ... or a .npz file of statistics'
    p.add_argument('real', help=text)
    p.add_argument('fake', help='the same')
    text = 'network: emoji (the default), clip:FOLDER, or inception, inception-tf, inception-clean:FILE'
    p.add_argument('--features', default='emoji', help=text)
    text = 'px of the square that all pictures are resized and cut to; default: as they are'
    p.add_argument('--resolution', type=flags.natural, default=0, help=text)
    for which in ('real', 'fake'):
        text = f'write the statistics of {which.upper()}, to be given in its place'
        p.add_argument(f'--save-{which}', type=flags.statistics_file, metavar='FILE.npz', help=text)

    p = verb(sweep, 'sweep', 'a grid of one prompt: LoRA scales or guidance, against steps')
    p.add_argument('prompt', nargs='+', help='one or several prompts; each has rows of its own')
    text = 'picture file; default: sweep.png'
    p.add_argument('--out', type=flags.picture_file, default='sweep.png', help=text)
    p.add_argument(
        '--model', default='emoji', help="'emoji' (the default), a folder, a file or a hub id"
    )
    p.add_argument(
        '--lora', metavar='FILE', help="the LoRA whose --scales are tried; 'lcm': shipped"
    )
    text = 'LoRAs that are always there; FILE:SCALE, repeatable'
    p.add_argument('--also', action='append', default=[], metavar='FILE:SCALE', help=text)
    numbers = {'nargs': '+', 'type': float}
    p.add_argument('--scales', **numbers, help='of --lora, a row each; default: 0 0.25 0.5 0.75 1')
    p.add_argument(
        '--guidance', **numbers, help='a row each, without --lora (but --also); one: for all'
    )
    p.add_argument(
        '--steps', nargs='+', type=flags.positive, default=[1, 2, 4, 8], help='a column each'
    )
    p.add_argument('--sampler', help='default: as the LoRA needs, lcm or ddim')
    p.add_argument('--seed', type=int, default=0, help='default: 0')
    text = 'network of the CLIP score below each picture: emoji (the default), clip:FOLDER'
    p.add_argument('--clip', default='emoji', help=text)
