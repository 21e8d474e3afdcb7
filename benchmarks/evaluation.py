"""
Quality of the small pipeline on the validation split: of generated meshes, or of reconstructions of its VAE.

    python benchmarks/evaluation.py --data data/small --every 8 --json generation.json
    python benchmarks/evaluation.py --data data/small --every 12 --mode reconstruction --json reconstruction.json
    python benchmarks/evaluation.py --data data/small --every 12 --mode reconstruction --refiner DIR --json FILE

The figures are those of `training/evaluate.py`, without its baseline; with `--sheet`, its pictures are written, too.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from diffusers_sparse3d.checks import check_packages
from diffusers_sparse3d.training.evaluation import command
from result_files import describe_run, parse_arguments, write_report


# Options that are handed on where they are given.
GIVEN = ("samples", "refiner", "resolution", "meshes", "limit")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset of prepare_data.py with pictures")
    parser.add_argument("--mode", choices=("generation", "reconstruction"), default="generation")
    parser.add_argument("--model", default="checkpoints/direct3d-s2-small", help="folder of a pipeline")
    parser.add_argument("--refiner", help="folder of an SDFRefiner, for reconstructions")
    parser.add_argument("--resolution", help="of reconstructions; by default that of the VAE")
    parser.add_argument("--meshes", help="original meshes, whose outer surface is compared with")
    parser.add_argument("--limit", help="at most this many meshes")
    parser.add_argument("--thresholds", nargs="+", help="distances of F1; by default those of `training/evaluate.py`")
    parser.add_argument("--every", type=int, default=1, help="one in so many meshes of the split")
    parser.add_argument("--samples", help="latents that `training/evaluate.py sample` made of the same meshes")
    parser.add_argument("--num_workers", type=int, default=2, help="processes for metrics")
    parser.add_argument("--sheet", type=Path, help="PNG with a picture of every mesh, to be written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, and write the summary and the figures of each mesh."""
    model = args.model if args.mode == "generation" else str(Path(args.model, "vae"))
    given = [name for name in GIVEN if getattr(args, name) is not None]
    options = {
        "--model": model,
        "--data": args.data,
        "--every": args.every,
        "--num_workers": args.num_workers,
        "--num_pictures": 0 if args.sheet is None else 10_000,
        "--num_baseline": 0,
        "--batch_size": 1,
        "--device": args.device,
        **{f"--{name}": getattr(args, name) for name in given},
    }
    words = [args.mode, "--output", "", *(str(word) for pair in options.items() for word in pair)]
    words += ["--thresholds", *args.thresholds] if args.thresholds else []
    choices = command.parse_arguments(words)
    if args.sheet is not None:
        check_packages("`--sheet`", "embreex")
    command.check_support(choices)
    found, cells = command.measure(choices)
    report = {**describe_run(args), "summary": found["summary"], "rows": found["samples"], "errors": found["errors"]}
    write_report(args.json, report)
    command.tell_errors(found)
    if args.sheet is not None:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        command.draw_sheet(cells, choices.picture_size, choices.columns).save(args.sheet)
    return report


if __name__ == "__main__":
    sys.exit(1 if main(parse_args())["errors"] else 0)
