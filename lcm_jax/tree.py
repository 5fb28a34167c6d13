"""Path names of a parameter tree, and first-match regex rules over them."""

import re

import jax

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


def first_match(rules, path):
    """The value of the first (regex, value) whose regex matches the whole path.

    Raises InputError if none does: rules must cover every leaf.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise InputError(f'no rule matches {path!r}; rules: {[pattern for pattern, _ in rules]}')


def count(tree):
    """Number of parameters in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def cast(tree, dtype):
    """The tree with floating leaves in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)
