"""`lcm-jax`: the human verbs. Heavy modules are imported by the verb that needs them."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from lcm_jax.errors import InputError


def demo(args):
    from lcm_jax.demo import demo

    demo(args.out, args.steps)


def train(args):
    import subprocess

    command = [sys.executable, '-m', 'lcm_jax.train', f'--config={args.config}', f'--workdir={args.workdir}',
               *(f'--config.{setting}' for setting in args.set)]
    sys.exit(subprocess.call(command))


def sample(args):
    from lcm_jax.grid import strip
    from lcm_jax.pipeline import Pipeline

    pipe = Pipeline.load(args.model)
    for i, file in enumerate(args.lora):
        pipe.add_lora(file, scale=args.scale[i] if i < len(args.scale) else 1.0)
    pictures = pipe(args.prompt, steps=args.steps, sampler=args.sampler, guidance=args.guidance,
                    negative=args.negative, seed=args.seed, count=args.count)
    save(strip(pictures) if len(pictures) > 1 else pictures[0], args.out)
    print(f'wrote {args.out}')


def save(picture, file):
    """Write a picture; it appears whole or not at all."""
    file = Path(file)
    if file.suffix.lower() not in ('.png', '.jpg', '.jpeg', '.webp'):
        raise InputError(f'--out {file}: the name must end in .png, .jpg, .jpeg or .webp')
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f'.part-{file.name}')
    picture.save(part)
    os.replace(part, file)


def convert(args):
    from lcm_jax.convert import convert

    print(convert(args.source, args.out, args.dtype))


def lora_inspect(args):
    from lcm_jax.convert import inspect_lora

    print(inspect_lora(args.file))


def lora_convert(args):
    from lcm_jax.convert import convert_lora

    print(convert_lora(args.file, args.out, args.model, args.dialect))


def parser():
    main = argparse.ArgumentParser(prog='lcm-jax', description='Few-step Stable Diffusion with LCM-LoRA.')
    verbs = main.add_subparsers(required=True, metavar='VERB')

    def verb(run, name, text, group=verbs):
        added = group.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    p = verb(demo, 'demo', 'Distil an LCM-LoRA from the shipped teacher, draw and measure.')
    p.add_argument('--out', default='demo-out', help='folder for pictures, report and LoRA')
    p.add_argument('--steps', type=positive, default=400, help='steps of distillation')

    p = verb(train, 'train', 'Distil from a config file (the same as python -m lcm_jax.train).')
    p.add_argument('--config', required=True, help='a file such as configs/emoji_lcm_lora.py')
    p.add_argument('--workdir', required=True, help='folder for checkpoints, logs and the LoRA')
    p.add_argument('--set', nargs='*', default=[], metavar='KEY=VALUE', help='e.g. train.steps=200')

    p = verb(sample, 'sample', 'Draw pictures.')
    p.add_argument('prompt')
    p.add_argument('--model', default='emoji', help="'emoji' or a diffusers folder")
    p.add_argument('--lora', action='append', default=[], help="a LoRA file, or 'lcm' (shipped); repeatable")
    p.add_argument('--scale', action='append', type=float, default=[], help='of each --lora, default 1')
    p.add_argument('--steps', type=positive, help='default: 4 with an acceleration LoRA, 50 without')
    p.add_argument('--sampler', help='ddim, dpm, dpm++ or lcm')
    p.add_argument('--guidance', type=float, help='1: none; default: 1 with an acceleration LoRA, 7.5 without')
    p.add_argument('--negative', help='negative prompt; acts only above guidance 1')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--count', type=positive, default=1)
    p.add_argument('--out', default='out.png')

    p = verb(convert, 'convert', 'Convert a model between a diffusers folder and an orbax checkpoint.')
    p.add_argument('source', help='a diffusers folder or an orbax checkpoint written by this command')
    p.add_argument('out', help='folder to write; it must not exist')
    p.add_argument('--dtype', default='keep', help='keep, float32, bfloat16 or float16')

    group = main_group(verbs)
    p = verb(lora_inspect, 'inspect', 'Say what is in a LoRA file.', group)
    p.add_argument('file')
    p = verb(lora_convert, 'convert', 'Write a LoRA file in another dialect.', group)
    p.add_argument('file')
    p.add_argument('out')
    p.add_argument('--model', default='emoji', help='the base model that the LoRA is for')
    p.add_argument('--dialect', default='kohya', help='kohya or peft')
    return main


def main_group(verbs):
    added = verbs.add_parser('lora', help='Look into and convert LoRA files.')
    return added.add_subparsers(required=True, metavar='VERB')


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text}: must be 1 or more')
    return value


def main(argv=None):
    """Run one verb; bad input ends with one line on stderr and status 1 (2 for bad arguments)."""
    args = parser().parse_args(argv)
    warnings.showwarning = lambda message, *rest: print(f'warning: {message}', file=sys.stderr)
    try:
        args.run(args)
    except InputError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit('interrupted')


if __name__ == '__main__':
    main()
