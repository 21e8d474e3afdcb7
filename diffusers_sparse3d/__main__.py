"""`python -m diffusers_sparse3d`, the same as the command `diffusers-sparse3d`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
