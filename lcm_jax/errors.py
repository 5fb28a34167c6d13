"""Errors for people: one line that names the thing, its value and what would be accepted."""

import contextlib
import difflib


class InputError(ValueError):
    """Bad input from outside (a file, a key, an argument); the CLI prints it without a traceback."""


@contextlib.contextmanager
def about(key):
    """An InputError that is raised meanwhile says first which key it is about."""
    try:
        yield
    except InputError as e:
        raise InputError(f'{key}: {e}') from e


def first_line(error):
    """What an exception says, in one line; the name of its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def choose(kind, name, table):
    """`table[name]`, or an InputError that lists what there is and the nearest match."""
    if name in table:
        return table[name]
    raise InputError(f'unknown {kind} {name!r}{nearest(name, table)}; one of: {", ".join(table)}')


def nearest(name, names):
    """' (did you mean ...?)' for the closest of `names`, or ''."""
    close = difflib.get_close_matches(str(name), list(names), 1)
    return f' (did you mean {close[0]!r}?)' if close else ''
