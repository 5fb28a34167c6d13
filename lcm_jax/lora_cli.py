"""The verbs of `lcm-jax lora`: what each takes, and which function does it."""

import sys

OUT = '.safetensors file to write; it must not exist'


def inspect(args):
    from lcm_jax.lora_files.describe import inspect_lora
    from lcm_jax.lora_files.find import find

    print(inspect_lora(find(args.file)))


def check(args):
    from lcm_jax.lora_files.find import find
    from lcm_jax.lora_files.verbs import check_lora

    text, dropped = check_lora(find(args.file), args.model, args.target)
    print(text)
    if dropped:
        sys.exit(1)


def convert(args):
    from lcm_jax.lora_files.find import find
    from lcm_jax.lora_files.verbs import convert_lora

    print(convert_lora(find(args.file), args.out, args.model, args.dialect))


def merge(args):
    from lcm_jax.lora_files.find import find, term
    from lcm_jax.lora_files.verbs import merge_loras

    terms = [(find(file), scale) for file, scale in map(term, args.terms)]
    print(merge_loras(terms, args.out, args.model, args.rank, args.dialect))


def extract(args):
    from lcm_jax.lora_files.verbs import extract_lora

    print(extract_lora(args.base, args.tuned, args.out, args.rank, args.dialect))


def add(verbs, verb):
    """Add `lora` and its verbs to the parser; verb(run, name, text, group) adds one."""
    text = 'look into, check, convert, merge or extract LoRA files'
    group = verbs.add_parser('lora', help=text, description=text)
    group = group.add_subparsers(required=True, metavar='VERB')

    def model(p):
        p.add_argument('--model', default='emoji', help='base model of the LoRA; default: emoji')

    def dialect(p):
        p.add_argument(
            '--dialect',
            help='kohya, kohya-sgm or peft; default: kohya-sgm for SDXL and SSD-1B, else kohya',
        )

    p = verb(inspect, 'inspect', 'say what is in a LoRA file, in any dialect', group)
    p.add_argument('file')

    p = verb(check, 'check', 'say how many modules of a LoRA file a program loads', group)
    p.add_argument('file')
    p.add_argument('--target', required=True, help='diffusers, comfyui or a1111')
    model(p)

    p = verb(convert, 'convert', 'write a LoRA file in another dialect', group)
    p.add_argument('file')
    p.add_argument('out', help=OUT)
    model(p)
    dialect(p)

    p = verb(merge, 'merge', 'write the weighted sum of LoRA files as one file', group)
    p.add_argument('terms', nargs='+', metavar='FILE:SCALE', help='without :SCALE it is 1')
    p.add_argument('out', help=OUT)
    p.add_argument('--rank', type=int, help='by SVD; default: exact, the ranks add up')
    model(p)
    dialect(p)

    p = verb(extract, 'extract', 'write the difference of two models as a LoRA', group)
    p.add_argument('base', help='a model in any form')
    p.add_argument('tuned', help='a fine-tune of it')
    p.add_argument('out', help=OUT)
    p.add_argument('--rank', type=int, required=True)
    dialect(p)
