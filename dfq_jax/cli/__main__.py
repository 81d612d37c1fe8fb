"""`python -m dfq_jax.cli`, where the script `dfq-jax` is not on the path."""

import sys

from dfq_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
