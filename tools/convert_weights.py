"""A diffusers folder to an orbax checkpoint, or back: `lcm-jax convert` as a script.

python tools/convert_weights.py SOURCE OUT [--dtype float32]
"""

import sys

from lcm_jax.cli import main

if __name__ == '__main__':
    main(['convert', *sys.argv[1:]])
