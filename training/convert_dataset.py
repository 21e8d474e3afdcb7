#!/usr/bin/env python
"""Converts a dataset of the format before records to shards of records.

    python training/convert_dataset.py --input data/old --output data/new

`--help` describes all arguments.
"""

from diffusers_sparse3d.training.convert_dataset import main


if __name__ == "__main__":
    main()
