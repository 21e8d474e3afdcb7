#!/usr/bin/env python
"""Puts trained parts together into the folder of a pipeline.

The same as `diffusers-sparse3d assemble`; `--help` describes all arguments.
"""

from diffusers_sparse3d.training.assembly import main


if __name__ == "__main__":
    main()
