"""Programs compiled before their arguments are in memory."""

import ctypes
import sys

import jax


def compiled(fn, *shapes, **options):
    """jax.jit(fn, **options) compiled for these ShapeDtypeStructs.

    The compiler needs gigabytes for a UNet's training step and frees them, but glibc keeps the pages
    and the weights, mapped, cannot have them: they are handed back here.
    """
    program = jax.jit(fn, **options).lower(*shapes).compile()
    if sys.platform == 'linux':
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # musl has none
        if trim:
            trim(0)
    return program
