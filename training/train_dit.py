#!/usr/bin/env python
"""Trains a diffusion transformer of the dense or the sparse stage on a dataset.

    accelerate launch training/train_dit.py --config training/configs/small/dit_dense.yaml

The same as `diffusers-sparse3d train dit`; docs/training.md describes every key of the configuration.
"""

from diffusers_sparse3d.training.dit import main


if __name__ == "__main__":
    main()
