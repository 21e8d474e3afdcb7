"""Draws `architecture.svg`: the way from a photo to a mesh, with the shapes of the tensors between the models.

    python docs/figures/architecture.py

Needs matplotlib (`pip install -e '.[train]'`).
"""

from pathlib import Path

import matplotlib


matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


WIDTH, HEIGHT = 2.6, 0.8
COLORS = {"data": "#f3f3f3", "model": "#cfe2f3", "geometry": "#d9ead3", "optional": "#fce5cd"}
# Kind, title and detail of each box, by row; the arrows between them are labelled with the tensors that pass.
ROWS = {
    "Image": [
        ("data", "photo", "RGBA, or with a mask"),
        ("geometry", "crop, centre, on white", "Sparse3DImageProcessor"),
        ("model", "image encoder", "DINOv2-L with registers"),
        ("data", "image tokens", "all, and of the foreground"),
    ],
    "Dense stage": [
        ("data", "noise", ""),
        ("model", "dense DiT", "50 steps, guidance 7"),
        ("model", "dense VAE, decoder", "occupancy logits"),
        ("geometry", "occupied cells", "probability from 0.1"),
    ],
    "Sparse stage, 512³": [
        ("data", "noise at cells", ""),
        ("model", "sparse DiT, SSA", "30 steps, guidance 7"),
        ("model", "sparse VAE, decoder", "512 samples a cell"),
        ("optional", "refiner", "distances, from features"),
        ("geometry", "marching cubes", "at twice the level"),
    ],
    "Sparse stage, 1024³": [
        ("geometry", "cells near the surface", "narrow band of the mesh"),
        ("model", "sparse DiT, SSA", "15 steps, guidance 7"),
        ("model", "sparse VAE, decoder", "512 samples a cell"),
        ("optional", "sign refiner", "inside or outside"),
        ("geometry", "marching cubes", "mesh, clean-up"),
    ],
}
TENSORS = {
    "Image": ["picture", "[B, 3, 518, 518]", "[B, 1374, 1024]"],
    "Dense stage": ["[B, 8, 16, 16, 16]", "[B, 8, 16, 16, 16]", "[B, 1, 64, 64, 64]"],
    "Sparse stage, 512³": ["[N, 16], [N, 4]", "[N, 16], [N, 4]", "[512 N, 1 + 32]", "[512 N, 1]"],
    "Sparse stage, 1024³": ["[N', 16], [N', 4]", "[N', 16], [N', 4]", "[512 N', 1]", "[V, 1]"],
}
COLUMN, ROW = 4.4, 1.75


def draw_box(axes: Axes, column: int, row: int, kind: str, title: str, detail: str) -> None:
    """A box with a title and a line of detail, centred at a place of the grid."""
    x, y = column * COLUMN, -row * ROW
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=COLORS[kind],
            edgecolor="#555555",
            linewidth=0.8,
        )
    )
    axes.text(x, y + (0.13 if detail else 0), title, ha="center", va="center", fontsize=9, fontweight="bold")
    axes.text(x, y - 0.19, detail, ha="center", va="center", fontsize=7.5, color="#333333")


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    """An arrow between two points."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, linewidth=0.9, color="#333333", linestyle=style
        )
    )


def draw_turn(axes: Axes, column: int, row: int, label: str) -> None:
    """The way from the last box of a row, at `column`, to the first box of the next."""
    x, y, between = column * COLUMN, -row * ROW, -(row + 0.5) * ROW
    axes.plot([x, x, 0], [y - HEIGHT / 2, between, between], color="#333333", linewidth=0.9)
    draw_arrow(axes, (0, between), (0, -(row + 1) * ROW + HEIGHT / 2))
    axes.text(0.15, between + 0.07, label, ha="left", va="bottom", fontsize=7.5)


def main() -> None:
    """Write the figure beside this file."""
    # Letters as text, and the same file for the same input.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "architecture", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(17, 5.6))
    for row, (name, boxes) in enumerate(ROWS.items()):
        axes.text(-WIDTH / 2 - 0.15, -row * ROW, name.replace(", ", ",\n"), ha="right", va="center", fontsize=9.5)
        for column, box in enumerate(boxes):
            draw_box(axes, column, row, *box)
            if column > 0:
                y = -row * ROW
                draw_arrow(axes, ((column - 1) * COLUMN + WIDTH / 2, y), (column * COLUMN - WIDTH / 2, y))
                axes.text((column - 0.5) * COLUMN, y + 0.09, TENSORS[name][column - 1], ha="center", fontsize=6.8)
    draw_turn(axes, 3, 1, "cells [N, 4] of the 64³ grid")
    draw_turn(axes, 4, 2, "mesh, normalised to 1.9; its cells are [N', 4] of the 128³ grid")
    # The tokens condition every transformer.
    x = 1 * COLUMN + 0.55
    axes.plot([3 * COLUMN, 3 * COLUMN, x], [-HEIGHT / 2, -0.5 * ROW, -0.5 * ROW], color="#333333", linewidth=0.9)
    draw_arrow(axes, (x, -0.5 * ROW), (x, -ROW + HEIGHT / 2), "--")
    axes.text(2.55 * COLUMN, -0.5 * ROW + 0.07, "to all three transformers", ha="right", va="bottom", fontsize=7.5)
    axes.text(-WIDTH / 2, -3.62 * ROW, "models", fontsize=8, va="center", bbox={"facecolor": COLORS["model"]})
    axes.text(0, -3.62 * ROW, "optional models", fontsize=8, va="center", bbox={"facecolor": COLORS["optional"]})
    axes.text(1.95, -3.62 * ROW, "geometry", fontsize=8, va="center", bbox={"facecolor": COLORS["geometry"]})
    axes.set(xlim=(-3.1, 4 * COLUMN + WIDTH / 2 + 0.1), ylim=(-3.85 * ROW, HEIGHT / 2 + 0.15))
    axes.set_axis_off()
    figure.savefig(Path(__file__).with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
