#!/usr/bin/env python
"""Trains a SparseVAE on the SDFs of a dataset.

    accelerate launch training/train_sparse_vae.py --config training/configs/small/vae_sparse.yaml

The same as `diffusers-sparse3d train sparse-vae`; docs/training.md describes every key of the configuration.
"""

from diffusers_sparse3d.training.sparse_vae import main


if __name__ == "__main__":
    main()
