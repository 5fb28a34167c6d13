"""`lcm-jax`: the human verbs. Heavy modules are imported by the verb that needs them."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from lcm_jax import lora_cli
from lcm_jax.errors import InputError

EPILOG = """examples:
  lcm-jax demo --out demo-out
  lcm-jax sample "a red heart, noto emoji" --lora lcm --count 4 --out hearts.png
  lcm-jax train --config configs/emoji_lcm_lora.py --workdir runs/emoji --set train.steps=200
  lcm-jax lora inspect demo-out/lcm_lora.safetensors

lcm-jax VERB --help says what a verb takes."""
PICTURES = ('.png', '.jpg', '.jpeg', '.webp')


def demo(args):
    from lcm_jax.demo import demo

    demo(args.out, args.steps)


def train(args):
    from lcm_jax.train import parse, run

    run(
        *parse(
            [
                f'--config={args.config}',
                f'--workdir={args.workdir}',
                *(f'--config.{setting}' for setting in args.set),
            ]
        )
    )


def sample(args):
    from lcm_jax.grid import strip
    from lcm_jax.pipeline import Pipeline

    if args.out.suffix.lower() not in PICTURES:
        raise InputError(f'--out {args.out}: the name must end in one of {", ".join(PICTURES)}')
    if len(args.scale) > len(args.lora):
        raise InputError(f'{len(args.scale)} --scale for {len(args.lora)} --lora; one each at most')
    pipe = Pipeline.load(args.model)
    scales = args.scale + [1.0] * (len(args.lora) - len(args.scale))
    for file, scale in zip(args.lora, scales, strict=True):
        pipe.add_lora(file, scale=scale)
    pictures = pipe(
        args.prompt,
        steps=args.steps,
        sampler=args.sampler,
        guidance=args.guidance,
        negative=args.negative,
        seed=args.seed,
        count=args.count,
        size=args.size,
    )
    save(strip(pictures) if len(pictures) > 1 else pictures[0], args.out)
    print(f'wrote {args.out}')


def save(picture, file):
    """Write a picture; it appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f'.part-{file.name}')
    picture.save(part)
    os.replace(part, file)


def convert(args):
    from lcm_jax.convert import convert

    loras = [lora_cli.term(text) for text in args.lora]
    print(convert(args.source, args.out, args.to, args.dtype, loras))


def parser():
    """The command line; every verb sets `run`, the function that does it."""
    main = argparse.ArgumentParser(
        prog='lcm-jax',
        description='Few-step Stable Diffusion with LCM-LoRA.',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = main.add_subparsers(required=True, metavar='VERB')

    def verb(run, name, text, group=verbs):
        added = group.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    p = verb(demo, 'demo', 'distil an LCM-LoRA from the shipped teacher, draw and measure')
    p.add_argument('--out', default='demo-out', help='folder for pictures, report and LoRA')
    p.add_argument('--steps', type=positive, default=400, help='steps of distillation')

    p = verb(train, 'train', 'distil from a config file (as python -m lcm_jax.train does)')
    p.add_argument('--config', required=True, help='a file such as configs/emoji_lcm_lora.py')
    p.add_argument('--workdir', required=True, help='folder for checkpoints, logs and the LoRA')
    p.add_argument(
        '--set',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='keys of configs/default.py, e.g. train.steps=200',
    )

    p = verb(sample, 'sample', 'draw pictures')
    p.add_argument('prompt')
    p.add_argument('--out', type=Path, default='out.png', help='picture file; default: out.png')
    p.add_argument('--model', default='emoji', help="'emoji' (the default) or a diffusers folder")
    p.add_argument(
        '--lora',
        action='append',
        default=[],
        metavar='FILE',
        help="a LoRA file, or 'lcm' (shipped); repeatable",
    )
    p.add_argument(
        '--scale',
        action='append',
        type=float,
        default=[],
        help='of each --lora, in order; default: 1',
    )
    p.add_argument('--steps', type=positive, help='default: 4 with an acceleration LoRA, else 50')
    p.add_argument(
        '--sampler', help='ddim, dpm, dpm++ or lcm; default: as the LoRA needs, lcm or ddim'
    )
    p.add_argument(
        '--guidance', type=float, help='1 is none; default: 1 with an acceleration LoRA, else 7.5'
    )
    p.add_argument('--negative', metavar='PROMPT', help='negative prompt; acts above guidance 1')
    p.add_argument('--seed', type=int, default=0, help='default: 0')
    p.add_argument('--count', type=positive, default=1, help='pictures of the prompt; default: 1')
    p.add_argument('--size', type=positive, nargs=2, metavar=('HEIGHT', 'WIDTH'), help='in px')

    p = verb(convert, 'convert', 'convert a model: diffusers folder, single file, orbax checkpoint')
    p.add_argument(
        'source', help="a model in any form: folder, single file, hub id, or 'emoji' (shipped)"
    )
    p.add_argument('out', help='folder or .safetensors file to write; it must not exist')
    p.add_argument(
        '--to',
        help='diffusers, original or orbax; default: original for a .safetensors file, '
        'orbax for a diffusers folder, diffusers for anything else',
    )
    p.add_argument(
        '--dtype', default='keep', help='keep (the default), float32, bfloat16 or float16'
    )
    p.add_argument(
        '--lora',
        action='append',
        default=[],
        metavar='FILE:SCALE',
        help='a LoRA to merge into the weights; repeatable; without :SCALE it is 1',
    )

    lora_cli.add(verbs, verb)
    return main


def positive(text):
    """Text -> int of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text}: must be 1 or more')
    return value


def main(argv=None):
    """Run one verb; bad input ends with one line on stderr and status 1 (2 for bad arguments)."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f'warning: {message}', file=sys.stderr)
        try:
            args.run(args)
        except (InputError, OSError) as e:
            sys.exit(f'error: {e}')
        except KeyboardInterrupt:
            sys.exit('interrupted')


if __name__ == '__main__':
    main()
