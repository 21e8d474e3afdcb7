"""Meshes to a training dataset: sparse SDFs with sharp-edge flags, dense occupancies and conditioning images.

    python training/prepare_data.py --input meshes/index.csv --output data/shapes --resolutions 256

`--input` is a CSV file with the columns `id` and `mesh` (and, where known, source, category, name, image, license,
author, split; paths relative to the file), a download of Objaverse (~/.objaverse/hf-objaverse-v1), or a folder, in
which every mesh is taken: its path is its id, its folder is its category. Meshes whose licence forbids commercial use
are left out unless `--non_commercial` is given.

What is finished is skipped when the script is started again. Meshes that fail, crash their process or take longer
than `--timeout` end up in OUTPUT/failures.csv with the reason; they are tried again the next time. On a cluster, start
one part on each machine and join them at the end, or let Ray spread the meshes; the shards are the same:

    python training/prepare_data.py --input meshes --output data/shapes --part 17/100
    python training/prepare_data.py --input meshes --output data/shapes --merge
    python training/prepare_data.py --input meshes --output data/shapes --runner ray

`--augment 4` makes four shapes of each mesh of the training split, `ID~0` to `ID~3`: stretched, mildly bent, mirrored
and turned so that all of their cameras are in front of them. `--renderer raster` renders on a CPU or a GPU with random
materials and lights. `--dense_only` leaves the SDFs out, for many shapes for the dense stage:

    python training/prepare_data.py --input meshes --output A --renderer raster --augment 4 plants=1.5 --num_views 6
    python training/prepare_data.py --input meshes --output B --renderer raster --augment 14 --dense_only --num_views 2

Rendering and SDFs can be computed on different machines:

    python training/prepare_data.py --input meshes --output A --renders_only
    python training/prepare_data.py --input meshes --output B --images_dir A/renders

`diffusers-sparse3d prepare` is the same command. docs/data.md describes the format.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from ...checks import check_device, check_packages
from ...command_parser import CommandParser, integer, number
from ...data.index import merge_index
from ..worker_pool import Failure
from .groups import Part, iterate_groups
from .index import MeshEntry, MeshIndex, Selection, parse_augment, parse_up_axis
from .jobs import Options
from .locks import beginning, locked
from .ray_runner import ray_options, run_on_ray
from .report import causes, merge_failures, write_card, write_failures, write_metadata
from .run import Preparation
from .settings import SETTINGS_FILE, Settings, claim_folder, meshes_per_shard


def parse_part(text: str) -> Part:
    """Parses an argument I/N, with I from 0 to N - 1."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
    return Part(int(index), int(count))


def parse_arguments(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The arguments of the command line; `prog` is the name of the command in its help."""
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="index.csv, Objaverse, or a folder of meshes")
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256], help="SDF grids, samples per axis")
    parser.add_argument("--num_views", type=int, default=6, help="renders per mesh or shape")
    parser.add_argument("--image_size", type=integer(8, 4096), default=224, help="pixels")
    parser.add_argument(
        "--azimuth_range", type=number(), nargs=2, default=(-90, 90), metavar=("MIN", "MAX"),
        help="degrees; 0 looks at the front (from +z), 90 from +x. The published half circle, centred on the front",
    )  # fmt: skip
    parser.add_argument("--elevation_range", type=number(-90, 90), nargs=2, default=(10, 40), metavar=("MIN", "MAX"))
    parser.add_argument("--focal_range", type=number(1), nargs=2, default=(30, 100), metavar=("MIN", "MAX"), help="mm")
    parser.add_argument("--webp_quality", type=integer(0, 100), default=85)
    parser.add_argument(
        "--up_axis", type=parse_up_axis, nargs="+", default=[], metavar="[SOURCE=]AXIS",
        help="axis of the meshes that points up, for all or by source; y by default",
    )  # fmt: skip
    parser.add_argument(
        "--random_colors", nargs="+", default=[], metavar="SOURCE",
        help="sources (or all) whose uncoloured meshes get a random plastic colour each, decided by the id",
    )  # fmt: skip
    parser.add_argument(
        "--renderer", choices=("embree", "raster"), default="embree",
        help="a ray caster on the CPU, or a rasteriser on --device with random materials and lights",
    )  # fmt: skip
    parser.add_argument(
        "--augment", type=parse_augment, nargs="+", default=[], metavar="[SOURCE=]N",
        help="shapes made of a mesh of the training split, by source; 1.5: two of every other mesh, 0.25: one of every"
        " fourth. Not given: meshes are taken as they are",
    )  # fmt: skip
    parser.add_argument(
        "--stretch", type=number(0, 1), default=0.2,
        help="of --augment: each axis is scaled by up to the exponential function of this",
    )  # fmt: skip
    parser.add_argument(
        "--bend", type=number(0, 1), default=0.2, help="of --augment: a part of the shapes is bent by up to this"
    )
    parser.add_argument("--dense_only", action="store_true", help="occupancy and pictures alone, without SDFs")
    parser.add_argument("--renders_only", action="store_true", help="write OUTPUT/renders and stop")
    parser.add_argument("--images_dir", type=Path, help="use these renders (ID/0.webp, ...) instead of rendering")
    parser.add_argument("--splits", nargs="+", help="only these splits of the index")
    parser.add_argument("--licenses", nargs="+", help="only these licences, as the index spells them")
    parser.add_argument(
        "--non_commercial", action="store_true", help="take meshes whose licence forbids commercial use, too"
    )
    parser.add_argument("--val_fraction", type=number(0, 1), default=0.05, help="of folders, where there is no index")
    parser.add_argument("--limit", type=integer(1), help="at most this many meshes")
    parser.add_argument("--runner", choices=("pool", "ray"), default="pool", help="processes here, or a Ray cluster")
    parser.add_argument("--part", type=parse_part, default=Part(), metavar="I/N", help="part I, from 0 on, of N")
    parser.add_argument("--merge", action="store_true", help="join what all parts have made, and stop")
    parser.add_argument(
        "--num_workers", type=integer(0),
        help="processes; 0: this one, no timeout; default: one for each core, for each task of Ray one",
    )  # fmt: skip
    parser.add_argument("--timeout", type=number(0), default=600, help="seconds per mesh")
    parser.add_argument(
        "--device", default="cpu", help="of distances and rasteriser; cuda: all GPUs, for all processes"
    )
    parser.add_argument("--workers_per_gpu", type=integer(1), default=8, help="processes that share a GPU, with Ray")
    parser.add_argument("--shard_size", type=number(0), default=256, help="MB, about; decides --meshes_per_shard")
    parser.add_argument("--meshes_per_shard", type=integer(1), help="rows of the input whose meshes share a shard")
    parser.add_argument("--seed", type=int, default=0, help="of views and colours")
    args = parser.parse_args(arguments)
    if args.renders_only and args.images_dir:
        parser.error("--renders_only and --images_dir exclude each other")
    if args.part.count > 1 and (args.runner == "ray" or args.merge):
        parser.error("--part excludes --merge and --runner ray, which take all parts")
    if args.num_views < 0:
        parser.error("--num_views must be at least 0, where every mesh comes with a picture")
    for resolution in args.resolutions:
        if resolution % 8 or not 16 <= resolution <= 2048:
            parser.error(f"--resolutions must be multiples of 8 from 16 to 2048, got {resolution}")
    return args


def make_settings(args: argparse.Namespace) -> Settings:
    """Returns the settings of a dataset from the command line."""
    resolutions = tuple(sorted(set(args.resolutions)))
    most = max((shapes for _, shapes in args.augment), default=1)
    shared = args.meshes_per_shard or meshes_per_shard(
        args.shard_size * 1e6, () if args.dense_only else resolutions, args.num_views, args.image_size, most
    )
    return Settings(
        resolutions=resolutions,
        num_views=args.num_views,
        image_size=args.image_size,
        azimuth_range=tuple(args.azimuth_range),
        elevation_range=tuple(args.elevation_range),
        focal_range=tuple(args.focal_range),
        webp_quality=args.webp_quality,
        seed=args.seed,
        up_axis=tuple(sorted(f"{source}={axis}" for source, axis in args.up_axis)),
        random_colors=tuple(sorted(args.random_colors)),
        rendered=args.images_dir is None,
        renderer=args.renderer,
        augment=tuple(sorted(f"{source}={shapes:g}" for source, shapes in args.augment)),
        stretch=args.stretch,
        bend=args.bend,
        dense_only=args.dense_only,
        meshes_per_shard=shared,
    )


def check_support(args: argparse.Namespace) -> None:
    """Checks what all meshes need: each of them would fail without it.

    Raises:
        ValueError: if the device cannot be used here.
        ImportError: if a package is missing.
    """
    on_cpu = args.device == "cpu"
    if not on_cpu:  # which needs no PyTorch in this process
        check_device("--device", args.device)
    if args.num_views and args.images_dir is None and args.renderer == "embree":
        check_packages("rendering the meshes", "embreex")
    if on_cpu and not args.renders_only:
        check_packages("the distance to a mesh", "igl")


def prepare(args: argparse.Namespace, entries: Sequence[MeshEntry] | None = None) -> None:
    """Prepares what is missing of a dataset, as `parse_arguments` describes it; of given meshes, not of `--input`.

    Raises:
        ValueError: if there is no mesh, another run uses the folder, it was begun with other settings, or the device
            cannot be used here.
        ImportError: if a package is missing that the meshes to prepare need, if there is one.
    """
    if args.runner == "ray" and not args.merge:
        # What its tasks need is on the machines of the cluster.
        check_packages("`--runner ray`", "ray")
    elif not args.merge and not (args.output / SETTINGS_FILE).exists():
        # Of a folder that is begun, all meshes may be prepared, which `_run` finds out.
        check_support(args)
    settings = make_settings(args)
    processes = args.num_workers
    if processes is None:
        processes = 1 if args.runner == "ray" else os.cpu_count() or 1
    options = Options(
        output=args.output,
        settings=settings,
        images_dir=args.images_dir,
        renders_only=args.renders_only,
        device=args.device,
        num_workers=processes,
        timeout=args.timeout,
    )
    meshes: Iterable[MeshEntry] = entries or MeshIndex(
        args.input, dict(args.up_axis), args.random_colors, args.val_fraction
    )
    selection = Selection(args.splits, args.limit, args.non_commercial, args.licenses)
    with locked(args.output, args.part):
        with beginning(args.output, args.part):
            claim_folder(args.output, settings)
            if not args.renders_only and not (args.output / "metadata.json").exists():
                write_metadata(args.output, settings)
        failed = 0 if args.merge else _run(args, options, meshes, selection)
        if args.renders_only:
            print(f"The pictures are in {options.renders}; {failed} meshes failed.")
        elif args.part.count > 1:
            print(f"Part {args.part} is done; {failed} meshes failed. `--merge` joins the parts when all are done.")
        else:
            finish(args.output, settings)


def _run(args: argparse.Namespace, options: Options, meshes: Iterable[MeshEntry], selection: Selection) -> int:
    """Prepares the meshes of one part, writes the list of those that failed, and returns their number."""
    total = None
    if args.part.count == 1:
        # A pass of its own over the rows, which are not kept; parts of a large input do without.
        groups = iterate_groups(meshes, selection, options.settings, args.part)
        total = sum(len(group.entries) for group in groups)
        left_out = sum(selection.has_split(entry) and not selection.has_license(entry) for entry in meshes)
        if left_out:
            print(f"{left_out} meshes are left out for their licence, see --licenses and --non_commercial.")
    groups = iterate_groups(meshes, selection, options.settings, args.part)
    with tqdm(total=total, desc="Preparing", unit="mesh") as bar:
        failed = 0

        def progress(count: int, failure: Failure | None) -> None:
            nonlocal failed
            bar.update(count)
            if failure is not None:
                failed += 1
                bar.set_postfix(failed=failed)

        if args.runner == "ray":
            preparation = Preparation(ray_options(options), progress)
            run_on_ray(preparation, groups, args.workers_per_gpu)
        else:
            preparation = Preparation(options, progress, check=partial(check_support, args))
            preparation.run(groups)
    write_failures(args.output, args.part, preparation.failures)
    return failed


def finish(output: Path, settings: Settings) -> None:
    """Joins what all parts of a preparation have made: index, failures, metadata and card."""
    number = merge_index(str(output))
    failures = merge_failures(output)
    write_metadata(output, settings)
    write_card(output, settings, failures)
    if (output / "items").exists() and not any((output / "items").iterdir()):
        (output / "items").rmdir()
    causes_text = f" ({causes(failures)})" if failures else ""
    print(f"{number} meshes are in {output}; {len(failures)} failed{causes_text}.")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of `prepare`."""
    prepare(parse_arguments(arguments, prog))
