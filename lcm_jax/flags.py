"""Command lines: of programs that a config file describes, and what all have in common."""

import argparse
import contextlib
import sys
import warnings
from pathlib import Path

from lcm_jax.data.files import remote
from lcm_jax.errors import InputError, choose

PICTURES = ('.png', '.jpg', '.jpeg', '.webp')
MARKS = {
    'train': 'lcm-jax train',
    'ways': 'lcm-jax evaluate',
}  # key of a config -> what takes those


@contextlib.contextmanager
def plainly():
    """Bad input ends the program with one line on stderr and status 1; a warning is a line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f'warning: {message}', file=sys.stderr)
        try:
            yield
        except (InputError, OSError) as e:
            sys.exit(f'error: {e}')
        except KeyboardInterrupt:
            sys.exit('interrupted')


def program(start, mark, usage, argv=None):
    """A module run with `python -m`: start(config, workdir, cluster); mark: a key of MARKS."""
    argv = sys.argv[1:] if argv is None else argv
    if {'-h', '--help'} & {*argv}:
        return print(usage)
    with plainly():
        start(*marked(mark, parse(argv)))


def marked(mark, parsed):
    """What `parse` gives, unless the config lacks the key `mark`: InputError."""
    config = parsed[0]
    if mark not in config:
        others = [verb for key, verb in MARKS.items() if key in config]
        raise InputError(
            f'not a config of {MARKS[mark]!r}: it has no {mark!r}'
            + (f'; it is one of {others[0]!r}' if others else '')
        )
    return parsed


def parse(argv):
    """['--config=FILE', '--workdir=DIR', '--config.KEY=VALUE', ...] -> locked config, workdir, cluster.

    cluster: keywords of `sharding.start_distributed`. Raises InputError for a file that is not
    there, an unknown key, a value of another type and a workdir that is no path.
    """
    from ml_collections import ConfigDict

    config, *_ = parse_flags([arg for arg in argv if not arg.startswith('--config.')])
    for arg in argv:
        if arg.startswith('--config.'):
            node = config
            for key in arg.removeprefix('--config.').split('=')[0].split('.'):
                node = choose('config key', key, node if isinstance(node, ConfigDict) else {})
    config, workdir, cluster, extra = parse_flags(argv)
    if extra or not workdir:
        raise InputError(
            f'arguments {" ".join(argv)}; give --config=FILE --workdir=DIR and, '
            'if you like, --config.KEY=VALUE'
        )
    if remote(workdir):
        raise InputError(
            f'--workdir {workdir}: must be a folder; mount the bucket (gcsfuse) and give its path, '
            'such as /mnt/BUCKET/runs'
        )
    return config, workdir, cluster


def read(file, settings):
    """A config file, and {'train.steps': value} over it -> locked config. Raises InputError as `parse`."""
    return parse(
        [f'--config={file}', '--workdir=.', *(f'--config.{k}={v}' for k, v in settings.items())]
    )[0]


CLUSTER = {
    'coordinator': (str, "HOST:PORT of the first of several processes, or 'auto'"),
    'processes': (int, 'how many there are'),
    'process': (int, 'which of them this is, from 0'),
}


def add_config(p, example, keys):
    """Add to an argparse parser what names a config. example: of a file; keys: of settings, with theirs."""
    p.add_argument('--config', required=True, help=f'a file such as {example}')
    p.add_argument(
        '--set',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help=f'keys of {keys}',
    )


def add_run(p, example, keys, outputs):
    """`add_config`, a folder for the outputs, and several processes."""
    add_config(p, example, keys)
    p.add_argument('--workdir', required=True, help=f'folder for {outputs}')
    for name, (kind, text) in CLUSTER.items():
        p.add_argument(f'--{name}', type=kind, help=text)


def parsed(args, mark):
    """What argparse made of `add_config` or `add_run` -> as `parse`. mark: a key of MARKS."""
    cluster = {k: getattr(args, k, None) for k in CLUSTER}
    argv = [
        f'--config={args.config}',
        f'--workdir={getattr(args, "workdir", ".")}',
        *(f'--config.{setting}' for setting in args.set),
        *(f'--{k}={value}' for k, value in cluster.items() if value is not None),
    ]
    return marked(mark, parse(argv))


def positive(text):
    """Text -> int of 1 or more, for argparse."""
    return at_least(1, text)


def natural(text):
    """Text -> int of 0 or more, for argparse."""
    return at_least(0, text)


def at_least(least, text):
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f'{text}: must be {least} or more')
    return value


def picture_file(text):
    """Text -> Path whose suffix says a format of pictures, for argparse."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f'{text}: the name must end in one of {", ".join(PICTURES)}'
        )
    return Path(text)


def statistics_file(text):
    """Text -> Path of a .npz file in a folder that is there, for argparse."""
    file = Path(text)
    if file.suffix != '.npz' or not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f'{text}: the name must end in .npz, and its folder must be there'
        )
    return file


def parse_flags(argv):
    """Command line -> config, workdir, cluster, other arguments, as absl and ml_collections read it."""
    from absl import flags
    from ml_collections import config_flags

    argv = ['lcm_jax', *argv]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string('workdir', None, 'For the outputs.', flag_values=values)
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer}
    cluster = {
        k: define[kind](k, None, text, flag_values=values) for k, (kind, text) in CLUSTER.items()
    }
    try:
        _, *extra = values(argv)
        if not (config.value and config.value.is_locked):  # an OSError, if the file cannot be read
            raise InputError('no --config=FILE given')
    except OSError as e:
        raise InputError(f'config file: {str(e).splitlines()[-1].strip()}') from e
    except (flags.Error, AttributeError, KeyError) as e:
        raise InputError(' '.join(str(e).split())) from e
    return config.value, workdir.value, {k: flag.value for k, flag in cluster.items()}, extra
