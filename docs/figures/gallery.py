#!/usr/bin/env python
"""Makes docs/gallery.png: every example picture, and the mesh of the small pipeline, by light and as normals.

    python docs/figures/gallery.py [--dense-steps N] [--steps N] [--size 180]

Without arguments, the pipeline's own steps are taken. It takes the extra `render`.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffusers_sparse3d.cli.models import check_device, load_pipeline, resolve_model
from diffusers_sparse3d.geometry.render import preview


ROOT = Path(__file__).resolve().parents[2]
STYLES = ("shaded", "normals")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="as of the command line")
    parser.add_argument("--dense-steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int, default=180, help="pixels of each picture")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gallery.png")
    args = parser.parse_args()

    pipe = load_pipeline(resolve_model(args.model), check_device(None), "float32")
    rows = []
    for path in sorted((ROOT / "examples").glob("*.png")):
        photo = Image.open(path)
        steps = {"dense_num_inference_steps": args.dense_steps, "num_inference_steps": args.steps}
        mesh = pipe(photo, generator=torch.Generator().manual_seed(0), **steps).meshes[0]
        # The photo and the front and the back of each style: of the four sides of `preview`, the first and the third.
        pictures = [preview(mesh, photo, args.size, style) for style in STYLES]
        places = [(0, 0)] + [(style, side) for style in range(len(STYLES)) for side in (1, 3)]
        row = Image.new("RGB", (len(places) * args.size, args.size), "white")
        for column, (style, side) in enumerate(places):
            box = (side * args.size, 0, (side + 1) * args.size, args.size)
            row.paste(pictures[style].crop(box), (column * args.size, 0))
        rows.append(row)
    sheet = Image.new("RGB", (rows[0].width, len(rows) * args.size), "white")
    for index, row in enumerate(rows):
        sheet.paste(row, (0, index * args.size))
    sheet.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
