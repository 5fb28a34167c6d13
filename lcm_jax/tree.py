"""Path names of a parameter tree, first-match regex rules over them, and a hash."""

import hashlib
import json
import re

import jax
import numpy as np

from lcm_jax.errors import InputError


def path_name(path):
    """jax key path -> 'down_blocks.0.resnets.0/conv1/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def named(tree):
    """tree -> [(path, leaf)] in tree order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(fn, tree):
    """fn(path, leaf) over the tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_name(path), leaf), tree)


def matches(pattern, path):
    """Whether a regex matches the whole path. Raises InputError for what is no regex."""
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as e:
        raise InputError(f'{pattern!r} is no regular expression: {e}') from e


def first_match(rules, path):
    """The value of the first (regex, value) whose regex matches the whole path.

    Raises InputError if none does: rules must cover every leaf.
    """
    for pattern, value in rules:
        if matches(pattern, path):
            return value
    raise InputError(f'no rule matches {path!r}; rules: {[pattern for pattern, _ in rules]}')


def count(tree):
    """Number of parameters in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def digest(tree, *settings):
    """Tree of arrays, and anything that is JSON -> 12 hexadecimal digits of the SHA-256 of all of it.

    Arrays come to the host one by one.
    """
    found = hashlib.sha256(json.dumps(settings).encode())
    for path, x in named(tree):
        found.update(f'{path} {x.shape}'.encode())
        found.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return found.hexdigest()[:12]
