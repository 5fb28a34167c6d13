"""A model from form to form, in both directions: `lcm-jax convert` as a script.

python tools/convert_weights.py SOURCE OUT [--to diffusers|original|orbax] [--dtype float16]
"""

import sys

from lcm_jax.cli import main

if __name__ == '__main__':
    main(['convert', *sys.argv[1:]])
