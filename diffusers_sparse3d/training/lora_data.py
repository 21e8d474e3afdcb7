"""The meshes of a fine-tuning: a user's folder, with or without pictures, to a dataset."""

import argparse
import hashlib
import json
from pathlib import Path

from ..checks import check_packages
from ..data.index import INDEX
from .preparation.command import parse_arguments, prepare
from .preparation.index import MeshEntry, read_index
from .preparation.report import FAILURES, read_rows


PICTURE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")


def is_dataset(path: Path) -> bool:
    """Whether a folder is a dataset that the preparation wrote."""
    return (path / "metadata.json").is_file()


def check_preparation_support(args: argparse.Namespace) -> None:
    """Raises an ImportError that says what to install if a package is missing that the preparation of meshes needs.

    Of meshes that were prepared before, or a dataset, nothing may be left to do: `prepare` asks where something is.
    """
    if not is_dataset(args.instance_data_dir) and not (args.output_dir / "data" / INDEX).is_file():
        check_packages("preparing the meshes", *(["embreex"] if args.num_views else []), "igl")


# Shapes of each mesh for a pipeline whose shapes face their cameras exactly.
TURNED_SHAPES = 4


def prepare_meshes(args: argparse.Namespace, resolutions: list[int], image_size: int, exact: bool = False) -> Path:
    """Prepares the meshes of a fine-tuning in OUTPUT_DIR/data, what is missing of them, and returns that folder.

    Args:
        args: Arguments of `lora_options.parse_arguments`.
        resolutions: Samples per axis of the SDFs.
        image_size: Edge of the pictures in pixels.
        exact: Whether the shapes of the pipeline face their cameras exactly, as a pixel-aligned dense stage has them.

    Raises:
        ValueError: if there are no meshes, or none can be prepared; the message has the reason of the first.
    """
    output = args.output_dir / "data"
    # A dataset that was begun with more resolutions, for more transformers, serves as well.
    if is_dataset(output):
        begun = json.loads((output / "metadata.json").read_text(encoding="utf-8"))["resolutions"]
        resolutions = begun if set(resolutions) <= set(begun) else resolutions
    entries = read_index(args.instance_data_dir, dict(args.up_axis), [], 0.0)
    if args.instance_images_dir is not None:
        add_pictures(entries, args.instance_images_dir, mesh_root(args.instance_data_dir))
    hold_back(entries, args.num_validation_meshes)
    options = ["--input", args.instance_data_dir, "--output", output, "--resolutions", *sorted(resolutions)]
    options += ["--num_views", args.num_views, "--image_size", image_size, "--seed", args.seed]
    if args.up_axis:
        options += ["--up_axis", *(f"{source}={axis}" for source, axis in args.up_axis)]
    if shapes := shapes_per_mesh(args, exact, any(entry.image for entry in entries)):
        options += ["--augment", shapes, "--stretch", 0, "--bend", 0]
    # The meshes are the user's own choice.
    options += ["--non_commercial", "--num_workers", args.preparation_workers, "--timeout", args.preparation_timeout]
    prepare(parse_arguments([str(option) for option in options]), entries)
    counts = json.loads((output / "metadata.json").read_text(encoding="utf-8"))["counts"]
    if not any("train" in splits for splits in counts.values()):
        failures = read_rows(output / FAILURES)
        reason = f"{failures[0]['id']}: {failures[0]['reason']}" if failures else "all are of another split"
        raise ValueError(
            f"`instance_data_dir` must hold a mesh to train on, {args.instance_data_dir} has none ({reason})"
        )
    return output


def shapes_per_mesh(args: argparse.Namespace, exact: bool, pictures: bool) -> int:
    """Returns how many shapes, turned to their cameras, are made of each mesh; 0: none, it is taken as it stands.

    Args:
        args: Arguments of `lora_options.parse_arguments`.
        exact: See `prepare_meshes`.
        pictures: Whether meshes come with pictures, which do not show what they become.

    Raises:
        ValueError: if shapes are asked for beside pictures of the meshes.
    """
    if args.shapes_per_mesh is None:
        return TURNED_SHAPES if exact and not pictures else 0
    if args.shapes_per_mesh < 0 or (args.shapes_per_mesh and pictures):
        raise ValueError(
            "`shapes_per_mesh` must be at least 0, and 0 beside pictures of the meshes (`instance_images_dir`, or the"
            f" column image of the index), which show them as they stand, got {args.shapes_per_mesh}"
        )
    return int(args.shapes_per_mesh)


def mesh_root(path: Path) -> Path:
    """Returns the folder that the paths of meshes are relative to."""
    return path if path.is_dir() else path.parent


def add_pictures(entries: list[MeshEntry], folder: Path, root: Path) -> None:
    """Gives each mesh the picture in `folder` that has the name of the mesh below `root`, or its id.

    Raises:
        ValueError: if there is no picture of any mesh.
    """
    for entry in entries:
        relative = entry.mesh.relative_to(root) if entry.mesh.is_relative_to(root) else Path(entry.mesh.name)
        names = [
            folder / f"{name}{suffix}" for name in (relative.with_suffix(""), entry.id) for suffix in PICTURE_SUFFIXES
        ]
        entry.image = next((name for name in names if name.is_file()), entry.image)
    if not any(entry.image for entry in entries):
        raise ValueError(
            f"`instance_images_dir` must hold pictures with the names of the meshes, such as {entries[0].id}.png;"
            f" {folder} has none"
        )


def hold_back(entries: list[MeshEntry], count: int | None) -> None:
    """Moves meshes to the validation split, unless the index has one: always the same ones, by their names.

    Args:
        entries: The meshes.
        count: Number of meshes; one in ten if None.

    Raises:
        ValueError: if none would be left to train on.
    """
    if any(entry.split != "train" for entry in entries):
        return
    count = len(entries) // 10 if count is None else count
    if not 0 <= count < len(entries):
        raise ValueError(f"`num_validation_meshes` must leave a mesh of the {len(entries)} to train on, got {count}")
    order = sorted(entries, key=lambda entry: hashlib.sha1(entry.id.encode()).digest())
    for entry in order[:count]:
        entry.split = "val"
