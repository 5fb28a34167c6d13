"""Command lines: of programs that a config file describes, and what all have in common."""

import argparse
import contextlib
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from lcm_jax.data.files import remote
from lcm_jax.errors import InputError, choose

PICTURES = ('.png', '.jpg', '.jpeg', '.webp')


class Kind(NamedTuple):
    """What a config is for."""

    verb: str  # that takes it
    example: str  # of a file
    keys: str  # where all its keys are
    setting: str  # one of them
    outputs: str  # what its workdir is for


KINDS = {  # by a key that no other kind has
    'train': Kind(
        'lcm-jax train',
        'configs/emoji_lcm_lora.py',
        'configs/default.py',
        'train.steps=200',
        'checkpoints, logs, pictures and what is trained',
    ),
    'ways': Kind(
        'lcm-jax evaluate',
        'configs/eval_emoji.py',
        'configs/eval.py',
        'seed=1',
        'tables, plots, grids and what is measured already',
    ),
}
CLUSTER = {
    'coordinator': (str, "HOST:PORT of the first of several processes, or 'auto'"),
    'processes': (int, 'how many there are'),
    'process': (int, 'which of them this is, from 0'),
}


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


def program(start, kind, usage, argv=None):
    """A module run with `python -m`: start(config, workdir, cluster); kind: a key of KINDS."""
    p = argparse.ArgumentParser(
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run(p, kind)
    with plainly():
        start(*settled(arguments(p, argv), kind))


def add_config(p, kind, example=None):
    """Add to an argparse parser what names a config of the kind and changes it, see `arguments`."""
    row = KINDS[kind]
    text = (
        f'a file such as {example or row.example}; --config.KEY=VALUE changes a key of it, one of '
        f'{row.keys}, e.g. --config.{row.setting}'
    )
    p.add_argument('--config', required=True, metavar='FILE', help=text)


def add_run(p, kind):
    """`add_config`, a folder for the outputs, and several processes."""
    add_config(p, kind)
    text = f'folder for {KINDS[kind].outputs}'
    p.add_argument('--workdir', required=True, metavar='DIR', help=text)
    for name, (of, text) in CLUSTER.items():
        p.add_argument(f'--{name}', type=of, help=text)


def arguments(p, argv=None):
    """What an argparse parser makes of a command line; of one that has --config, also `settings`.

    settings: {KEY: VALUE} of its --config.KEY=VALUE.
    """
    args, more = p.parse_known_args(argv)
    settings = re.compile(r'--config\.([^=]+)=(.*)', re.S)
    found = [settings.fullmatch(arg) if hasattr(args, 'config') else None for arg in more]
    strange = [arg for arg, setting in zip(more, found, strict=True) if not setting]
    if strange:
        p.error(f'unrecognized arguments: {" ".join(strange)}')
    args.settings = dict(setting.groups() for setting in found)
    return args


def settled(args, kind):
    """What `arguments` gives -> config, workdir, cluster: keywords of `processes.start_distributed`.

    Raises InputError as `read`, for a config that lacks the key `kind`, and for a workdir that is no path.
    """
    workdir = getattr(args, 'workdir', None)
    for name, given in (('config', args.config), ('workdir', workdir)):
        if given == '':
            raise InputError(f'--{name} is empty')
    config = read(args.config, args.settings)
    if kind not in config:
        others = [row.verb for key, row in KINDS.items() if key in config]
        raise InputError(
            f'not a config of {KINDS[kind].verb!r}: it has no {kind!r}'
            + (f'; it is one of {others[0]!r}' if others else '')
        )
    if workdir and remote(workdir):
        raise InputError(
            f'--workdir {workdir}: must be a folder; mount the bucket (gcsfuse) and give its path, '
            'such as /mnt/BUCKET/runs'
        )
    return config, workdir, {k: getattr(args, k, None) for k in CLUSTER}


def read(file, settings):
    """A config file, and {'train.steps': value} over it -> locked config.

    Raises InputError for a file that is not there, an unknown key and a value of another type.
    """
    from ml_collections import ConfigDict

    config = _read(file, {})
    for path in settings:
        node = config
        for key in path.split('.'):
            node = choose('config key', key, node if isinstance(node, ConfigDict) else {})
    return _read(file, settings)


def _read(file, settings):
    """As absl and ml_collections read it."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    argv = ['', f'--config={file}', *(f'--config.{k}={v}' for k, v in settings.items())]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    try:
        values(argv)
        if not isinstance(config.value, ConfigDict):
            getattr(config.value, 'keys', None)  # raises OSError, if the file could not be read
            raise InputError(f'{file}: its get_config() must give a ConfigDict')
    except OSError as e:
        raise InputError(f'config file: {str(e).splitlines()[-1].strip()}') from e
    except (flags.Error, AttributeError, KeyError) as e:
        raise InputError(' '.join(str(e).split())) from e
    return config.value


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
