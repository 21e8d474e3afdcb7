#!/usr/bin/env python
"""Meshes to a training dataset: sparse SDFs, dense occupancies and conditioning images.

    python training/prepare_data.py --input meshes/index.csv --output data/shapes --resolutions 256

The same as `diffusers-sparse3d prepare`; `--help` describes all arguments.
"""

from diffusers_sparse3d.training.preparation import main


if __name__ == "__main__":
    main()
