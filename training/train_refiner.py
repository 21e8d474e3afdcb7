#!/usr/bin/env python
"""Trains a refiner of the signed distances, or of the signs, that a SparseVAE decodes.

    accelerate launch training/train_refiner.py --config training/configs/published/refiner.yaml

The same as `diffusers-sparse3d train refiner`; docs/training.md describes every key of the configuration.
"""

from diffusers_sparse3d.training.refiner import main


if __name__ == "__main__":
    main()
