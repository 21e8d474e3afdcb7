"""Tiny datasets of real meshes, in the format of shards and in the one before it."""

import csv
import io
import json
from pathlib import Path

import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file

from diffusers_sparse3d.data.folder import Folder
from diffusers_sparse3d.data.index import merge_index
from diffusers_sparse3d.data.records import mesh_columns, mesh_record, mesh_section_names, pack_bits
from diffusers_sparse3d.data.writer import ShardWriter
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks


RESOLUTIONS = [16, 32]
SHAPES = {
    "box": trimesh.creation.box((1.0, 0.6, 0.4)),
    "sphere": trimesh.creation.icosphere(subdivisions=2),
    "annulus": trimesh.creation.annulus(0.3, 0.6, 0.5),
}
METADATA = json.dumps({"resolutions": RESOLUTIONS, "dense_resolution": 2, "image_size": 8})


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (50 * number, 9, 7, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def facts(number: int) -> dict:
    """Columns of a shape: each has one picture more than the last, of which the last one was given."""
    split = "val" if number == 1 else "train"
    azimuths = [-90.0, 12.5, 77.0][:number]
    return {"split": split, "license": "CC0-1.0", "source": "primitives", "num_given": 1, "azimuths": azimuths}


def write_dataset(folder: Folder | str | Path, shard_bytes: int = 100_000) -> None:
    """Writes the dataset in shards of about two shapes."""
    sections, columns = mesh_section_names(RESOLUTIONS), mesh_columns(RESOLUTIONS)
    with ShardWriter(folder, sections, columns, shard_bytes=shard_bytes) as writer:
        for number, (name, mesh) in enumerate(SHAPES.items()):
            fields = [mesh_to_sdf_blocks(mesh, resolution) for resolution in RESOLUTIONS]
            pictures = [picture(view) for view in range(number + 1)]
            writer.add(mesh_record(name, fields, pictures, **facts(number)))
    merge_index(Folder(folder))
    Folder(folder).write_text("metadata.json", METADATA)


def write_old_dataset(folder: Path) -> None:
    """Writes the same as version 0.3 did: safetensors shards of many meshes, and index.csv."""
    folder.mkdir()
    rows = []
    for number, (name, mesh) in enumerate(SHAPES.items()):
        tensors = {}
        for resolution in RESOLUTIONS:
            blocks = mesh_to_sdf_blocks(mesh, resolution)
            values = blocks.values.flatten(1)
            # float16 must not round values of the band to 1.
            values = values.where(values.abs() == 1, values.clamp(2**-11 - 1, 1 - 2**-11))
            tensors[f"{name}/sdf_{resolution}/coords"] = blocks.coords.to(torch.uint8)
            tensors[f"{name}/sdf_{resolution}/values"] = values.half()
            tensors[f"{name}/sdf_{resolution}/sharp"] = pack_bits(blocks.sharp.flatten(1))
            if resolution == 16:
                grid = torch.zeros(2, 2, 2, dtype=torch.bool)
                grid[tuple(blocks.coords.long().T)] = True
                tensors[f"{name}/occupancy"] = pack_bits(grid.flatten())
        for view in range(number + 1):
            tensors[f"{name}/images/{view}"] = torch.frombuffer(bytearray(picture(view)), dtype=torch.uint8)
        save_file(tensors, folder / f"shard-{number:05d}.safetensors")
        known = {**facts(number), "azimuths": " ".join(f"{azimuth:.1f}" for azimuth in facts(number)["azimuths"])}
        rows.append({"id": name, "category": "", "name": "", "author": "", "shard": number, "num_images": number + 1})
        rows[-1].update(known)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "metadata.json").write_text(METADATA)
