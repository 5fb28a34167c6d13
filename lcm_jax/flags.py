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


def parse_flags(argv):
    """Command line -> config, workdir, cluster, other arguments, as absl and ml_collections read it."""
    from absl import flags
    from ml_collections import config_flags

    argv = ['lcm_jax', *argv]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string('workdir', None, 'For the outputs.', flag_values=values)
    cluster = {
        'coordinator': flags.DEFINE_string('coordinator', None, 'HOST:PORT', flag_values=values),
        'processes': flags.DEFINE_integer('processes', None, 'How many.', flag_values=values),
        'process': flags.DEFINE_integer('process', None, 'Which of them.', flag_values=values),
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
