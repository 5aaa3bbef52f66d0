"""`python -m llamapro_jax`: the command `llamapro`, where it is not on the path."""

import sys

from llamapro_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
