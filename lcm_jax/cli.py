"""`lcm-jax`: the human verbs. Heavy modules are imported by the verb that needs them."""

import argparse
from pathlib import Path

from lcm_jax import data_cli, eval_cli, flags, lora_cli, plan_cli
from lcm_jax.errors import InputError

EPILOG = """examples:
  lcm-jax demo --out demo-out
  lcm-jax sample "a red heart, noto emoji" --lora lcm --count 4 --out hearts.png
  lcm-jax sample "a cat, noto emoji" --lora lcm --image in.png --strength 0.6 --out cat.png
  lcm-jax train --config configs/emoji_lcm_lora.py --workdir runs/emoji --config.train.steps=200
  lcm-jax data check emoji --sheet sheet.png
  lcm-jax lora inspect demo-out/lcm_lora.safetensors

lcm-jax VERB --help says what a verb takes."""
DTYPES = ('float32', 'bfloat16', 'float16')
# Arguments of `sample` that go to the pipeline as they are.
PASSED_ON = (
    *('negative', 'strength', 'sampler', 'steps', 'spacing', 'guidance'),
    *('seed', 'count', 'size', 'clip_skip', 'truncate'),
    *('original_size', 'crop', 'target_size'),
)


def demo(args):
    from lcm_jax.demo import demo

    demo(args.out, args.steps)


def train(args):
    from lcm_jax.train import start

    start(*flags.settled(args, 'train'))


def sample(args):
    from lcm_jax.grid import save, strip
    from lcm_jax.lora_files.find import term
    from lcm_jax.pipeline import Pipeline

    loras = [term(text) for text in args.lora]
    image = args.image and read_picture(args.image)
    mask = args.mask and read_picture(args.mask, 'black')  # what is transparent is kept
    pipe = Pipeline.load(
        args.model,
        args.dtype,
        args.vae_dtype,
        vae=args.vae,
        prediction_type=args.prediction_type,
    )
    pipe.set_loras(loras)
    options = {name: getattr(args, name) for name in PASSED_ON}
    pictures = pipe(args.prompt, image=image, mask=mask, **options)
    save(strip(pictures) if len(pictures) > 1 else pictures[0], args.out)
    print(f'wrote {args.out}')


def read_picture(file, ground='white'):
    """A picture file -> PIL image, as training would see it. Raises InputError if it cannot be read."""
    from lcm_jax.data.samples import FORMATS, Broken, decode

    try:
        return decode(Path(file).read_bytes(), ground)
    except OSError as e:
        raise InputError(f'cannot read the picture {file}: {e.strerror or e}') from e
    except Broken as e:
        raise InputError(
            f'cannot read the picture {file}, as {", ".join(FORMATS)}: {e.detail}'
        ) from e


def convert(args):
    from lcm_jax.convert import convert
    from lcm_jax.lora_files.find import find, term

    loras = [(find(file), scale) for file, scale in map(term, args.lora)]
    print(convert(args.source, args.out, args.to, args.dtype, loras, args.prediction_type))


def parser():
    """The command line; every verb sets `run`, the function that does it."""
    main = argparse.ArgumentParser(
        prog='lcm-jax',
        description='Few-step Stable Diffusion with LCM-LoRA.',
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = main.add_subparsers(required=True, metavar='VERB')

    def verb(run, name, text, group=verbs):
        added = group.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    p = verb(demo, 'demo', 'distil an LCM-LoRA from the shipped teacher, draw and measure')
    p.add_argument('--out', default='demo-out', help='folder for pictures, report and LoRA')
    p.add_argument('--steps', type=flags.positive, default=400, help='steps of distillation')

    p = verb(train, 'train', 'distil or fine-tune from a config file (as python -m lcm_jax.train)')
    flags.add_run(p, 'train')

    sample_arguments(verb(sample, 'sample', 'draw pictures'))

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
    p.add_argument(
        '--prediction-type', help='epsilon, v_prediction or sample, in place of what the model says'
    )

    eval_cli.add(verb)
    data_cli.add(verbs, verb)
    plan_cli.add(verb)
    lora_cli.add(verbs, verb)
    return main


def sample_arguments(p):
    add = p.add_argument
    size = {'type': int, 'nargs': 2, 'metavar': ('HEIGHT', 'WIDTH')}
    add('prompt')
    add('--out', type=flags.picture_file, default='out.png', help='picture file; default: out.png')
    add('--model', default='emoji', help="'emoji' (the default), a folder, a file or a hub id")
    add('--vae', help='a model, folder or file with another VAE, such as TAESD for previews')
    add('--prediction-type', help='of a file that does not say, e.g. v_prediction')
    add('--dtype', choices=DTYPES, help='default: bfloat16, on CPUs float32')
    add('--vae-dtype', choices=DTYPES, default='float32', help='default: float32')

    repeat = {'action': 'append', 'default': [], 'metavar': 'FILE:SCALE'}
    add('--lora', **repeat, help='a LoRA; shipped: lcm, fluent; repeatable; without :SCALE it is 1')

    add = p.add_argument_group('how to draw').add_argument
    add('--steps', type=flags.positive, help='default: 4 with the sampler lcm, else 50')
    add(
        '--sampler',
        help='ddim, dpm, dpm++, euler or lcm; default: lcm or ddim, as LoRA and model need',
    )
    add('--spacing', help="leading, trailing, linspace or lcm times; default: the sampler's")
    text = "1 is none, the default with lcm; else the model's, such as 7.5, SDXL 5, full LCMs 8.5"
    add('--guidance', type=float, help=text)
    add('--negative', metavar='PROMPT', help='negative prompt; acts above guidance 1')
    add('--seed', type=int, default=0, help='default: 0')
    add('--count', type=flags.positive, default=1, help='pictures of the prompt; default: 1')
    add('--size', **size, help="in px; default: the image's, or the model's")
    add('--clip-skip', type=int, default=0, metavar='N', help='last text layers to leave out')
    add('--truncate', action='store_true', help='cut a prompt that is too long, with a warning')

    add = p.add_argument_group('from a picture').add_argument
    add('--image', metavar='FILE', help='picture to start from')
    add('--strength', type=float, help='of the change, above 0 to 1; default: 0.8, with --mask 1')
    add('--mask', metavar='FILE', help='picture that is light where --image is drawn anew')

    add = p.add_argument_group('what SDXL is told of sizes, in px').add_argument
    add('--original-size', **size, help='default: --size')
    add('--crop', **size | {'metavar': ('TOP', 'LEFT')}, help='default: 0 0')
    add('--target-size', **size, help='default: --size')


def main(argv=None):
    """Run one verb; bad input ends with one line on stderr and status 1 (2 for bad arguments)."""
    args = flags.arguments(parser(), argv)
    with flags.plainly():
        args.run(args)


if __name__ == '__main__':
    main()
