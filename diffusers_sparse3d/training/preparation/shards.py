"""The files of a dataset: shards, index, metadata and card."""

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .index import MeshEntry
from .items import Options


ENTRY_COLUMNS = ["id", "source", "category", "name", "license", "author", "split"]
INDEX_COLUMNS = [*ENTRY_COLUMNS, "shard", "num_images", "num_given", "azimuths"]


def replace_text(path: Path, text: str) -> None:
    """Writes a text file under another name and renames it, so that it is never there in part."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Writes a CSV file with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_text(path, buffer.getvalue())


def pack_shards(entries: list[MeshEntry], options: Options, output: Path, shard_bytes: int) -> None:
    """Moves finished items into shards of about `shard_bytes` bytes and lists them in OUTPUT/index.csv."""
    rows: list[dict[str, Any]] = [*read_rows(output / "index.csv")]
    packed: list[tuple[MeshEntry, int]] = []
    tensors: dict[str, torch.Tensor] = {}
    size = 0
    shard = 1 + max((int(row["shard"]) for row in rows), default=-1)
    finished = [entry for entry in entries if options.item_path(entry).exists()]
    for number, entry in enumerate(tqdm(finished, desc="Packing", unit="mesh")):
        with safe_open(options.item_path(entry), "pt") as item:
            for key in item.keys():  # noqa: SIM118 (not a dictionary)
                tensor = tensors[f"{entry.id}/{key}"] = item.get_tensor(key)
                size += tensor.nbytes
            packed.append((entry, sum(key.startswith("images/") for key in item.keys())))  # noqa: SIM118
        if size < shard_bytes and number + 1 < len(finished):
            continue
        path = output / f"shard-{shard:05d}.safetensors"
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        for done, num_images in packed:
            known: dict[str, Any] = {key: getattr(done, key) for key in ENTRY_COLUMNS}
            num_given = int(done.image is not None)
            counts = {"num_images": num_images, "num_given": num_given}
            rows.append({**known, "shard": shard, **counts, "azimuths": options.azimuths(done)})
        # Items are deleted after they are listed: a break in between loses nothing.
        write_rows(output / "index.csv", INDEX_COLUMNS, rows)
        for done, _ in packed:
            options.item_path(done).unlink()
        packed, tensors, size, shard = [], {}, 0, shard + 1


def count_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """A Markdown table with the number of rows for each combination of values in some columns."""
    counts = Counter(tuple(row[column] or "(unknown)" for column in columns) for row in rows)
    lines = [" | ".join([*columns, "meshes"]), " | ".join(["---"] * (len(columns) + 1))]
    lines += [" | ".join([*(value.replace("|", "/") for value in key), str(counts[key])]) for key in sorted(counts)]
    return "\n".join(f"| {line} |" for line in lines)


def write_metadata(output: Path, options: Options) -> None:
    """Writes metadata.json: resolutions, image size, and the number of meshes by source, split and licence.

    Raises:
        ValueError: if the dataset was begun with other resolutions or another image size.
    """
    path = output / "metadata.json"
    rows = read_rows(output / "index.csv")
    sources = sorted({row["source"] for row in rows})
    counts = {source: Counter(row["split"] for row in rows if row["source"] == source) for source in sources}
    metadata = {
        "resolutions": sorted(options.resolutions),
        "dense_resolution": min(options.resolutions) // 8,
        "image_size": options.image_size,
        "counts": counts,
        "licenses": dict(sorted(Counter(row["license"] for row in rows).items())),
    }
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for key in ("resolutions", "image_size"):
            if earlier[key] != metadata[key]:
                raise ValueError(
                    f"`{key}` must be {earlier[key]}, with which the dataset {output} was begun, got {metadata[key]}"
                )
    replace_text(path, json.dumps(metadata, indent=2) + "\n")


def write_card(output: Path, options: Options, failures: list[dict[str, Any]]) -> None:
    """Writes the dataset card, README.md: contents, ranges of the views, counts, licences and failures."""
    rows = read_rows(output / "index.csv")
    grids = ", ".join(f"{resolution}^3" for resolution in sorted(options.resolutions))
    reasons = count_table([{**row, "reason": row["reason"].split(":")[0]} for row in failures], ["source", "reason"])
    card = f"""# Sparse SDF dataset

{len(rows)} meshes, made by `training/prepare_data.py` in the format that `diffusers_sparse3d/training/dataset.py` describes:

- sparse signed distance fields at {grids}, with sharp-edge flags;
- dense occupancy at {min(options.resolutions) // 8}^3;
- images with alpha, {options.image_size} x {options.image_size} pixels: renders, and {sum(int(row["num_given"]) for row in rows)} that came with their mesh.

Views of the renders are random (seed {options.seed}), unless the renders came from elsewhere:

| | from | to | |
| --- | --- | --- | --- |
| azimuth | {options.azimuth_range[0]:g} | {options.azimuth_range[1]:g} | degrees; 0 looks at the front (from +z; y is up), 90 from +x |
| elevation | {options.elevation_range[0]:g} | {options.elevation_range[1]:g} | degrees |
| focal length | {options.focal_range[0]:g} | {options.focal_range[1]:g} | mm, on a 36 mm sensor |

## Counts

{count_table(rows, ["source", "split"])}

## Licences and attributions

{count_table(rows, ["source", "license", "author"])}

## Meshes that failed

{f"{len(failures)}, listed in failures.csv:" if failures else "None."}

{reasons if failures else ""}
"""  # noqa: E501
    replace_text(output / "README.md", card.rstrip() + "\n")
