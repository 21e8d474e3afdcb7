#!/usr/bin/env python
"""Converts a published Direct3D-S2 checkpoint to a diffusers folder.

    python conversion/convert_direct3d_s2.py --original DIR --output DIR [--variant fp16] [--image_encoder ENCODER]

The same as `diffusers-sparse3d convert`; docs/conversion.md says more.
"""

from diffusers_sparse3d.loaders.convert import main


if __name__ == "__main__":
    main()
