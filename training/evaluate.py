#!/usr/bin/env python
"""Measures a VAE's reconstructions, or the meshes that a pipeline generates from images, on a split of a dataset.

    python training/evaluate.py reconstruction --model outputs/small/vae_sparse/vae --data data/small --output eval
    python training/evaluate.py generation --model outputs/small/pipeline --data data/small --output eval

The same as `diffusers-sparse3d evaluate`; `--help` describes all arguments.
"""

if __name__ == "__main__":
    # Imported here, as worker processes import this script too.
    import sys

    from diffusers_sparse3d.training.evaluation.command import main

    sys.exit(main())
