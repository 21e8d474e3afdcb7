"""`python -m diffusers_sparse3d.cli`, for `accelerate launch -m`: the same as the command `diffusers-sparse3d`."""

import sys

from . import main


if __name__ == "__main__":
    sys.exit(main())
