#!/usr/bin/env python
"""Trains a DenseVAE on the occupancies of a dataset.

    accelerate launch training/train_dense_vae.py --config training/configs/small/vae_dense.yaml

The same as `diffusers-sparse3d train dense-vae`; docs/training.md describes every key of the configuration.
"""

from diffusers_sparse3d.training.dense_vae import main


if __name__ == "__main__":
    main()
