#!/usr/bin/env python
"""Meshes to a training dataset: sparse SDFs with sharp-edge flags, dense occupancies and conditioning images.

    python training/prepare_data.py --input meshes/index.csv --output data/shapes --resolutions 256

`--input` is a CSV file with the columns `id` and `mesh` (and, where known, source, category, name, image, license,
author, split; paths relative to the file), or a folder, in which every mesh is taken: its path is its id, its folder
is its category.

What is finished is skipped when the script is started again. Meshes that fail, crash their process or take longer
than `--timeout` end up in OUTPUT/failures.csv with the reason; they are tried again the next time. Rendering and SDFs
can be computed on different machines:

    python training/prepare_data.py --input meshes --output A --renders_only
    python training/prepare_data.py --input meshes --output B --images_dir A/renders

The dataset's format is described in `dataset.py`.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from worker_pool import WorkerPool

from diffusers_sparse3d.geometry.mesh import load_mesh
from diffusers_sparse3d.geometry.render import BASE_COLOR, UP_ROTATIONS, MeshRenderer
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks


AZIMUTHS_FILE = "azimuths.txt"
MESH_SUFFIXES = {".glb", ".gltf", ".obj", ".off", ".ply", ".stl"}
ENTRY_COLUMNS = ["id", "source", "category", "name", "license", "author", "split"]
INDEX_COLUMNS = [*ENTRY_COLUMNS, "shard", "num_images", "num_given", "azimuths"]
# sRGB colours in which plastic things are often made, for meshes that have no colours of their own.
PLASTIC_COLORS = [
    (0.79, 0.10, 0.04), (0.00, 0.33, 0.75), (0.95, 0.80, 0.20), (0.14, 0.47, 0.25), (0.95, 0.95, 0.93),
    (0.63, 0.65, 0.66), (0.42, 0.43, 0.41), (0.13, 0.14, 0.15), (1.00, 0.50, 0.08), (0.35, 0.20, 0.12),
    (0.87, 0.78, 0.61), (0.58, 0.73, 0.24), (0.27, 0.65, 0.83), (0.98, 0.68, 0.75), (0.36, 0.18, 0.55),
    (0.45, 0.10, 0.13), (0.04, 0.20, 0.36), (0.10, 0.56, 0.53), (0.75, 0.62, 0.45), (0.84, 0.86, 0.88),
]  # fmt: skip


@dataclass
class MeshEntry:
    """One mesh to prepare: a row of the index, with its paths resolved."""

    id: str
    mesh: Path
    source: str = ""
    category: str = ""
    name: str = ""
    image: Path | None = None
    license: str = ""
    author: str = ""
    split: str = "train"
    up_axis: str = "y"
    random_color: bool = False


@dataclass
class Options:
    """What to make of each mesh; sent to the worker processes."""

    renders: Path
    items: Path
    make_renders: bool
    make_sdfs: bool
    resolutions: list[int]
    num_views: int
    image_size: int
    azimuth_range: tuple[float, float]
    elevation_range: tuple[float, float]
    focal_range: tuple[float, float]
    webp_quality: int
    seed: int
    device: str = "cpu"

    def num_images(self, entry: MeshEntry) -> int:
        return self.num_views + (entry.image is not None)

    def image_paths(self, entry: MeshEntry) -> list[Path]:
        return sorted((self.renders / entry.id).glob("*.webp"), key=lambda path: int(path.stem))

    def azimuths(self, entry: MeshEntry) -> str:
        """Of the renders, in degrees, as `write_renders` left them; empty for renders that came from elsewhere."""
        path = self.renders / entry.id / AZIMUTHS_FILE
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def item_path(self, entry: MeshEntry) -> Path:
        return self.items / f"{entry.id}.safetensors"

    def is_done(self, entry: MeshEntry) -> bool:
        rendered = not self.make_renders or len(self.image_paths(entry)) == self.num_images(entry)
        return rendered and (not self.make_sdfs or self.item_path(entry).exists())


def read_index(path: Path, up_axes: dict[str, str], random_colors: list[str], val_fraction: float) -> list[MeshEntry]:
    """The meshes of an index file or a folder. `up_axes` maps a source to its axis; "" stands for all others.

    Raises:
        ValueError: if `path` holds no mesh, the index lacks a column, or an id is not unique or not a file name.
    """
    if path.is_dir() and (path / "index.csv").exists():
        path = path / "index.csv"
    if path.is_dir():
        rows = []
        for mesh in sorted(mesh for mesh in path.rglob("*") if mesh.suffix.lower() in MESH_SUFFIXES):
            relative = mesh.relative_to(path)
            group = relative.parent.as_posix()
            rows.append({"id": "-".join(relative.with_suffix("").parts), "mesh": relative, "category": group})
            # Meshes of one folder may be variants of one thing: they stay on one side of the split.
            key = relative.as_posix() if group == "." else group
            share = int.from_bytes(hashlib.sha1(key.encode()).digest()[:4], "big") / 2**32
            rows[-1]["split"] = "val" if share < val_fraction else "train"
        root = path
    else:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        missing = {"id", "mesh"} - set(rows[0] if rows else ())
        if missing:
            raise ValueError(f"The index {path} has no rows or lacks the columns {sorted(missing)}.")
        root = path.parent
    if not rows:
        raise ValueError(f"`input` {path} holds no mesh ({', '.join(sorted(MESH_SUFFIXES))}).")
    entries, seen = [], set()
    for row in rows:
        if row["id"] in seen or not row["id"] or "/" in row["id"] or row["id"].startswith("."):
            raise ValueError(f"The id {row['id']!r} in {path} is not unique or cannot be a file name.")
        seen.add(row["id"])
        source = row.get("source", "")
        known = {key: row[key] for key in ("category", "name", "license", "author", "split") if row.get(key)}
        entries.append(
            MeshEntry(
                id=row["id"],
                mesh=root / row["mesh"],
                source=source,
                image=root / row["image"] if row.get("image") else None,
                up_axis=up_axes.get(source, up_axes.get("", "y")),
                random_color=source in random_colors or "all" in random_colors,
                **known,
            )
        )
    return entries


def prepare_entry(entry: MeshEntry, options: Options) -> None:
    """Makes what is missing of one mesh: its pictures, its SDFs."""
    if options.make_renders and len(options.image_paths(entry)) != options.num_images(entry):
        write_renders(entry, options)
    if options.make_sdfs:
        write_item(entry, options)


def write_renders(entry: MeshEntry, options: Options) -> None:
    """Renders a mesh from random directions into RENDERS/ID/0.webp, 1.webp, ...; its given image comes last. The
    azimuths of the renders go into azimuths.txt."""
    digest = hashlib.sha1(f"{options.seed} {entry.id}".encode()).digest()
    generator = np.random.default_rng(list(digest))
    base_color = BASE_COLOR
    if entry.random_color:
        color = np.array(PLASTIC_COLORS[generator.integers(len(PLASTIC_COLORS))])
        base_color = np.clip(color + generator.uniform(-0.04, 0.04, 3), 0.02, 0.98)
    renderer = MeshRenderer(entry.mesh, up_axis=entry.up_axis, base_color=base_color)
    images, azimuths = [], []
    for _ in range(options.num_views):
        ranges = (options.azimuth_range, options.elevation_range, options.focal_range)
        view = [generator.uniform(*limits) for limits in ranges]
        key_light = (generator.uniform(-70, 70), generator.uniform(25, 70))
        azimuths.append(f"{view[0]:.1f}")
        images.append(renderer.render(*view, options.image_size, crop=True, sky_rays=4, key_light=key_light))
    if entry.image is not None:
        images.append(square_image(Image.open(entry.image), options.image_size))
    temporary = options.renders / f".{entry.id}"
    temporary.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        if not image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox():
            raise ValueError(f"Image {k} is empty: nothing of the mesh can be seen, or its `image` is transparent.")
        image.save(temporary / f"{k}.webp", quality=options.webp_quality, method=4)
    (temporary / AZIMUTHS_FILE).write_text(" ".join(azimuths) + "\n", encoding="utf-8")
    target = options.renders / entry.id
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def square_image(image: Image.Image, size: int) -> Image.Image:
    """The square around an image's foreground, framed as the renders are: `[size, size]`, RGBA."""
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox() or (0, 0, *image.size)
    half = 0.54 * max(box[2] - box[0], box[3] - box[1])
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    window = tuple(round(edge) for edge in (x - half, y - half, x + half, y + half))
    # Premultiplied, so that the colour of transparent pixels does not bleed in.
    return image.crop(window).convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def write_item(entry: MeshEntry, options: Options) -> None:
    """Computes the SDFs of a mesh and puts them, with its images, into a file that `pack_shards` picks up."""
    images = options.image_paths(entry)
    if not images:
        raise ValueError(f"There are no images in {options.renders / entry.id}.")
    mesh = load_mesh(entry.mesh)
    mesh.vertices = mesh.vertices @ UP_ROTATIONS[entry.up_axis].T
    tensors = {f"images/{k}": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
               for k, path in enumerate(images)}  # fmt: skip
    for resolution in options.resolutions:
        blocks = mesh_to_sdf_blocks(mesh, resolution, progress=False, device=options.device)
        coords, values = blocks.coords.to(torch.uint8), blocks.values.reshape(-1, 512)
        # The largest float16 below 1: what is in the band stays in it.
        limit = 1 - 2**-11
        values = torch.where(values.abs() < 1, values.clamp(-limit, limit), values).half()
        sharp = np.packbits(blocks.sharp.reshape(-1, 512).numpy(), axis=1)
        tensors[f"sdf_{resolution}/coords"] = coords
        tensors[f"sdf_{resolution}/values"] = values
        tensors[f"sdf_{resolution}/sharp"] = torch.from_numpy(sharp)
        if resolution == min(options.resolutions):
            occupancy = np.zeros((resolution // 8,) * 3, dtype=bool)
            occupancy[tuple(blocks.coords.T.numpy())] = True
            tensors["occupancy"] = torch.from_numpy(np.packbits(occupancy))
    path = options.item_path(entry)
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary)
    temporary.rename(path)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    temporary = path.with_suffix(".part")
    temporary.write_text(buffer.getvalue(), encoding="utf-8")
    temporary.rename(path)


def pack_shards(entries: list[MeshEntry], options: Options, output: Path, shard_bytes: int) -> None:
    """Moves finished items into shards of about `shard_bytes` and lists them in OUTPUT/index.csv."""
    rows = read_rows(output / "index.csv")
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
        save_file(tensors, output / f"shard-{shard:05d}.safetensors")
        for done, num_images in packed:
            known = {key: getattr(done, key) for key in ENTRY_COLUMNS}
            num_given = int(done.image is not None)
            counts = {"num_images": num_images, "num_given": num_given}
            rows.append({**known, "shard": shard, **counts, "azimuths": options.azimuths(done)})
        # Listed first, deleted then: a break in between loses nothing.
        write_rows(output / "index.csv", INDEX_COLUMNS, rows)
        for done, _ in packed:
            options.item_path(done).unlink()
        packed, tensors, size, shard = [], {}, 0, shard + 1


def count_table(rows: list[dict], columns: list[str]) -> str:
    """A Markdown table that counts rows by the values of some columns."""
    counts = Counter(tuple(row[column] or "(unknown)" for column in columns) for row in rows)
    lines = [" | ".join([*columns, "meshes"]), " | ".join(["---"] * (len(columns) + 1))]
    lines += [" | ".join([*(value.replace("|", "/") for value in key), str(counts[key])]) for key in sorted(counts)]
    return "\n".join(f"| {line} |" for line in lines)


def write_metadata(output: Path, options: Options) -> None:
    """Writes metadata.json.

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
                raise ValueError(f"`output` {output} was begun with {key} {earlier[key]}, not {metadata[key]}.")
    path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def write_card(output: Path, options: Options, failures: list[dict]) -> None:
    """Writes the dataset card."""
    rows = read_rows(output / "index.csv")
    grids = ", ".join(f"{resolution}^3" for resolution in sorted(options.resolutions))
    reasons = count_table([{**row, "reason": row["reason"].split(":")[0]} for row in failures], ["source", "reason"])
    card = f"""# Sparse SDF dataset

{len(rows)} meshes, made by `training/prepare_data.py` in the format that `training/dataset.py` describes:

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
    (output / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


def key_value(text: str) -> tuple[str, str]:
    source, _, axis = text.rpartition("=")
    if axis not in UP_ROTATIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither AXIS nor SOURCE=AXIS with AXIS in x, y, z")
    return source, axis


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="index.csv, or a folder of meshes")
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256], help="SDF grids, samples per axis")
    parser.add_argument("--num_views", type=int, default=6, help="renders per mesh")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument(
        "--azimuth_range", type=float, nargs=2, default=(-90, 90), metavar=("MIN", "MAX"),
        help="degrees; 0 looks at the front (from +z), 90 from +x. The published half circle, centred on the front",
    )  # fmt: skip
    parser.add_argument("--elevation_range", type=float, nargs=2, default=(10, 40), metavar=("MIN", "MAX"))
    parser.add_argument("--focal_range", type=float, nargs=2, default=(30, 100), metavar=("MIN", "MAX"), help="mm")
    parser.add_argument("--webp_quality", type=int, default=85)
    parser.add_argument(
        "--up_axis", type=key_value, nargs="+", default=[], metavar="[SOURCE=]AXIS",
        help="axis of the meshes that points up, for all or by source; y by default",
    )  # fmt: skip
    parser.add_argument(
        "--random_colors", nargs="+", default=[], metavar="SOURCE",
        help="sources (or all) whose uncoloured meshes get a random plastic colour each, decided by the id",
    )  # fmt: skip
    parser.add_argument("--renders_only", action="store_true", help="write OUTPUT/renders and stop")
    parser.add_argument("--images_dir", type=Path, help="use these renders (ID/0.webp, ...) instead of rendering")
    parser.add_argument("--splits", nargs="+", help="only these splits of the index")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="of folders, where there is no index")
    parser.add_argument("--limit", type=int, help="at most this many meshes")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes; 0: this one, no timeout")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per mesh")
    parser.add_argument("--device", default="cpu", help="of the distances; cuda is worth it beside many processes")
    parser.add_argument("--shard_size", type=int, default=64, help="MB")
    parser.add_argument("--seed", type=int, default=0, help="of views and colours")
    args = parser.parse_args(arguments)
    if args.renders_only and args.images_dir:
        parser.error("--renders_only and --images_dir exclude each other")
    if args.num_views < 1:
        parser.error("--num_views must be at least 1")
    for resolution in args.resolutions:
        if resolution % 8 or not 16 <= resolution <= 2048:
            parser.error(f"--resolutions must be multiples of 8 from 16 to 2048, got {resolution}")
    return args


def main(args: argparse.Namespace) -> None:
    output = args.output
    options = Options(
        renders=args.images_dir or output / "renders",
        items=output / "items",
        make_renders=args.images_dir is None,
        make_sdfs=not args.renders_only,
        resolutions=args.resolutions,
        num_views=args.num_views,
        image_size=args.image_size,
        azimuth_range=tuple(args.azimuth_range),
        elevation_range=tuple(args.elevation_range),
        focal_range=tuple(args.focal_range),
        webp_quality=args.webp_quality,
        seed=args.seed,
        device=args.device,
    )
    entries = read_index(args.input, dict(args.up_axis), args.random_colors, args.val_fraction)
    entries = [entry for entry in entries if not args.splits or entry.split in args.splits][: args.limit]
    output.mkdir(parents=True, exist_ok=True)
    if options.make_sdfs:
        options.items.mkdir(exist_ok=True)
        write_metadata(output, options)
    packed = {row["id"] for row in read_rows(output / "index.csv")}
    todo = [entry for entry in entries if entry.id not in packed and not options.is_done(entry)]
    # The largest first, so that none of them is still at work when all others are done.
    todo.sort(key=lambda entry: entry.mesh.stat().st_size if entry.mesh.exists() else 0, reverse=True)
    failures = []
    # With a process per core, more threads would only get into each other's way.
    if args.num_workers > 0:
        for variable in ("OMP_NUM_THREADS", "IGL_NUM_THREADS"):
            os.environ.setdefault(variable, "1")
    pool = WorkerPool(prepare_entry, args.num_workers, args.timeout)
    with tqdm(total=len(entries), initial=len(entries) - len(todo), desc="Preparing", unit="mesh") as bar:
        for (entry, _), reason in pool.run([(entry, options) for entry in todo]):
            if reason is not None:
                known = {"id": entry.id, "source": entry.source, "split": entry.split, "mesh": entry.mesh}
                failures.append({**known, "reason": reason})
                bar.set_postfix(failed=len(failures))
            bar.update()
    write_rows(output / "failures.csv", ["id", "source", "split", "mesh", "reason"], failures)
    if options.make_sdfs:
        pack_shards(entries, options, output, args.shard_size * 10**6)
        for unfinished in options.items.glob("*.part"):
            unfinished.unlink()
        if not any(options.items.iterdir()):  # items outside of --limit or --splits wait for their run
            options.items.rmdir()
        write_metadata(output, options)
        write_card(output, options, failures)
    print(f"{len(entries) - len(failures)} of {len(entries)} meshes are in {output}; {len(failures)} failed.")


if __name__ == "__main__":
    main(parse_args())
