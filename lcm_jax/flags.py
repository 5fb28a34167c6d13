"""Command lines of programs that a config file describes."""

from lcm_jax.errors import InputError, choose


def parse(argv):
    """['--config=FILE', '--workdir=DIR', '--config.KEY=VALUE', ...] -> locked config, workdir, cluster.

    cluster: keywords of `sharding.start_distributed`. Raises InputError for a file that is not
    there, an unknown key and a value of another type.
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


def parsed(args):
    """What argparse made of `add_config` or `add_run` -> as `parse`."""
    cluster = {k: getattr(args, k, None) for k in CLUSTER}
    return parse(
        [
            f'--config={args.config}',
            f'--workdir={getattr(args, "workdir", ".")}',
            *(f'--config.{setting}' for setting in args.set),
            *(f'--{k}={value}' for k, value in cluster.items() if value is not None),
        ]
    )


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
