#!/usr/bin/env python
"""Meshes to a training dataset: sparse SDFs, dense occupancies and conditioning images.

    python training/prepare_data.py --input meshes/index.csv --output data/shapes --resolutions 256

The same as `diffusers-sparse3d prepare`; `--help` describes all arguments.
"""

if __name__ == "__main__":
    # Imported here, as worker processes import this script too.
    from diffusers_sparse3d.training.preparation.command import main

    main()
