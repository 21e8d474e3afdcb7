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

`diffusers-sparse3d prepare` is the same command. `diffusers_sparse3d/training/dataset.py` describes the format.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ...command_parser import CommandParser
from ..worker_pool import WorkerPool
from .index import MeshEntry, parse_up_axis, read_index
from .items import Options, prepare_entry
from .shards import pack_shards, read_rows, write_card, write_metadata, write_rows


def parse_arguments(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The arguments of the command line; `prog` is the name of the command in its help."""
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        "--up_axis", type=parse_up_axis, nargs="+", default=[], metavar="[SOURCE=]AXIS",
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
    if args.num_views < 0:
        parser.error("--num_views must be at least 0, where every mesh comes with a picture")
    for resolution in args.resolutions:
        if resolution % 8 or not 16 <= resolution <= 2048:
            parser.error(f"--resolutions must be multiples of 8 from 16 to 2048, got {resolution}")
    return args


def prepare(args: argparse.Namespace, entries: list[MeshEntry] | None = None) -> None:
    """Prepares what is missing of a dataset, as `parse_arguments` describes it; of given meshes, not of `--input`."""
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
    if entries is None:
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


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `prepare`."""
    prepare(parse_arguments(arguments, prog))
