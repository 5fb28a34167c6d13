"""The verbs of `lcm-jax data`: what each takes, and which function does it."""

import dataclasses

from lcm_jax import flags
from lcm_jax.data.settings import DataSettings, check_latents
from lcm_jax.errors import InputError

# Options that are keys of DataSettings, with what their help says.
OPTIONS = {
    'resolution': 'px of the square that is cut out, or of one of its area',
    'crop': 'random or center',
    'flip': 'from left to right, half of the time',
    'buckets': "shapes near each picture's own",
    'caption': 'extension of the caption file, or field of the JSON or the features',
    'min_size': 'least px of the shorter side; 0: any',
    'max_watermark': 'largest pwatermark, 0..1; 0: any',
    'min_aesthetic': 'least aesthetic score, 0..10; 0: any',
    'max_unsafe': 'largest punsafe, 0..1; 0: any',
    'max_dropped': 'share of broken samples, and of unreadable files, that is borne',
    'seed': 'of the order, crops and flips',
    'threads': 'that read and decode',
    'workers': 'processes that read and decode, besides',
}


def settings(args):
    """Parsed arguments -> DataSettings that a run may have."""
    said = DataSettings(source=args.source, **{key: getattr(args, key) for key in OPTIONS})
    check_latents(said)
    return said


def check(args):
    from lcm_jax.data.check import contact_sheet, report
    from lcm_jax.data.sources import open_source
    from lcm_jax.grid import save
    from lcm_jax.model import describe
    from lcm_jax.text import Tokenizer

    said = settings(args)
    source = open_source(args.source, said)
    tokenizer = describe(args.model).tokenizers[0] if args.model else Tokenizer.clip()
    for line in report(source, tokenizer, said, args.limit):
        print(line, flush=True)
    if args.sheet and not source.encoded:
        save(contact_sheet(source, said), args.sheet)
        print(f'wrote {args.sheet}')


def cache(args):
    from tqdm import tqdm

    from lcm_jax.data.cache_fill import write_cache
    from lcm_jax.data.files import remote
    from lcm_jax.data.sources import open_source
    from lcm_jax.encode import at_once, encoder
    from lcm_jax.model import describe
    from lcm_jax.models.shapes import DTYPES

    if args.process >= args.processes:
        raise InputError(
            f'--process {args.process} of --processes {args.processes}: counted from 0'
        )
    if remote(args.out):
        raise InputError(
            f'{args.out}: caches are written by path: give a local folder, and copy it'
        )
    said = settings(args)
    source = open_source(args.source, said)
    for line in source.left_out():
        print(line, flush=True)
    model = describe(args.model)
    encode = encoder(model, DTYPES[args.dtype], DTYPES[args.vae_dtype])
    with tqdm(total=-(-len(source) // args.processes), unit=' samples') as bar:
        done, broken, cut = write_cache(
            args.out,
            source,
            model.tokenizers,
            said,
            encode,
            model=args.model,
            weights=model.marks(model.encoders),
            batch=args.batch or at_once(said.resolution, len(source)),
            process=args.process,
            processes=args.processes,
            log=lambda n: bar.update(n - bar.n),
        )
    for what, drops in (('broken, when read', broken), ('captions cut', cut)):
        if drops:
            print(f'{what}: {drops}')
    told = {'model': args.model, 'data.source': f'cache:{args.out}'}
    told |= {'data.resolution': said.resolution, 'dtype': args.dtype, 'vae_dtype': args.vae_dtype}
    line = ' '.join(f'--config.{key}={value}' for key, value in told.items())
    print(f'wrote {done:,} samples; train with {line}')


def add(verbs, verb):
    """Add `data` and its verbs to the parser; verb(run, name, text, group) adds one."""
    text = 'check a source of captioned pictures, or encode it once for training'
    group = verbs.add_parser('data', help=text, description=text)
    group = group.add_subparsers(required=True, metavar='VERB')

    p = verb(check, 'check', 'read a source as a run would, and say what is in it', group)
    options(p)
    p.add_argument(
        '--limit', type=flags.natural, default=1000, help='samples to read; 0: all; default: 1000'
    )
    p.add_argument(
        '--sheet', type=flags.picture_file, metavar='FILE', help='picture file for a contact sheet'
    )
    text = "whose tokens captions are counted in; default: CLIP's, as Stable Diffusion has them"
    p.add_argument('--model', help=text)

    p = verb(cache, 'cache', 'write latents and text embeddings of a source', group)
    options(p)
    p.add_argument('out', help='folder to write')
    p.add_argument('--model', default='emoji', help='whose VAE and text encoders; default: emoji')
    for name, what in (('--dtype', 'text encoders'), ('--vae-dtype', 'VAE')):
        text = f'of the {what}, as in the config of the run; default: float32'
        p.add_argument(name, choices=('float32', 'bfloat16'), default='float32', help=text)
    p.add_argument(
        '--batch', type=flags.positive, help='samples encoded at once; default: by their size'
    )
    p.add_argument(
        '--process', type=flags.natural, default=0, help='which of --processes this is; default: 0'
    )
    p.add_argument(
        '--processes', type=flags.positive, default=1, help='that share the work; default: 1'
    )


def options(p):
    """The source, and an option for each row of OPTIONS."""
    p.add_argument('source', help="such as emoji or 'wds:shards/{00000..00041}.tar'")
    defaults = {field.name: field.default for field in dataclasses.fields(DataSettings)}
    for key, text in OPTIONS.items():
        default, name = defaults[key], '--' + key.replace('_', '-')
        if default is False:
            p.add_argument(name, action='store_true', help=text)
        else:
            text = f'{text}; default: {default}'
            p.add_argument(name, type=type(default), default=default, help=text)
