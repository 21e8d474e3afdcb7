"""Tiny meshes and their preparation, for the tests of preparation."""

import csv
from pathlib import Path

import pyarrow.parquet as parquet
import trimesh
from PIL import Image

from diffusers_sparse3d.data.reader import RecordReader
from diffusers_sparse3d.training.preparation.command import main, make_settings, parse_arguments
from diffusers_sparse3d.training.preparation.settings import Settings


SETTINGS = ["--num_workers", "0", "--resolutions", "32", "64", "--num_views", "2", "--image_size", "32"]


def prepare(root: Path, output: Path, *options: str) -> None:
    """Prepares the meshes of a folder."""
    main(["--input", str(root), "--output", str(output), *SETTINGS, *options])


def settings(**changes: object) -> Settings:
    """The settings of `prepare`, with changes."""
    arguments = parse_arguments(["--input", "x", "--output", "x", *SETTINGS])
    for name, value in changes.items():
        setattr(arguments, name, value)
    return make_settings(arguments)


def write_meshes(root: Path) -> Path:
    """An index of a tall box with a photo, a torus, and a file that is no mesh."""
    root.mkdir()
    trimesh.creation.box((1, 2, 1)).export(root / "box.ply")
    trimesh.creation.torus(1, 0.4, major_sections=16, minor_sections=8).export(root / "torus.ply")
    (root / "broken.ply").write_text("this is no mesh")
    photo = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    photo.paste((255, 0, 0, 255), (4, 5, 14, 15))
    photo.save(root / "box.png")
    columns = ["id", "source", "category", "name", "mesh", "image", "license", "author", "split"]
    rows = [
        ["a-box", "boxes", "Box", "Tall box", "box.ply", "box.png", "CC0-1.0", "Ann", "train"],
        ["a-torus", "rings", "Ring", "Torus", "torus.ply", "", "CC-BY-4.0", "Bob", "val"],
        ["bad", "rings", "Ring", "Broken", "broken.ply", "", "CC-BY-4.0", "Bob", "train"],
    ]
    with (root / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return root


def read_sections(output: Path) -> dict:
    """The tensors of all sections of all records of a dataset, by id."""
    table = parquet.read_table(output / "index.parquet")
    reader = RecordReader(output, table)
    names = [name.removesuffix("_length") for name in table.column_names if name.endswith("_length")]
    return {
        row["id"]: {name: reader.read(number, name) for name in names} for number, row in enumerate(table.to_pylist())
    }
