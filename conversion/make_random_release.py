#!/usr/bin/env python
"""Makes a folder in the layout of the published Direct3D-S2 checkpoints, with random weights, to try things out on.

python conversion/make_random_release.py --output DIR [--layout v1.0] [--tiny]
"""

from diffusers_sparse3d.loaders.random_release import main


if __name__ == "__main__":
    main()
