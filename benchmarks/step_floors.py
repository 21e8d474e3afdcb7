"""
Operations of the training steps that `scaling.py` measures, counted from models and samples without running them.

    python benchmarks/step_floors.py --json benchmarks/results/step_floors.json

The models and batches are those of `training/configs/published/`, the samples the cells of a torus at 1024^3. A row is
a step of one GPU: operations of the forward pass, and of the whole step: backward twice as many, and the blocks once
more where gradient checkpointing is on. They are those of linear layers, convolutions and attention
(`benchmarks/floors.py`); frozen models, losses and the optimizer count as nothing.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F

from benchmark_meshes import torus_cells
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from floors import StepWork, dit_work, vae_work
from published import MODELS, read_published
from result_files import describe_run, parse_arguments, write_report
from scaling import torus_distances
from ssa_model import Sizes


def batch(coords: torch.Tensor, samples: int) -> CoordinateCache:
    """Several samples of the same voxels `[M, 3]`."""
    return CoordinateCache(torch.cat([F.pad(coords, (1, 0), value=index) for index in range(samples)]).int(), samples)


def count(model: str, tokens: int, image_tokens: int) -> dict[str, Any]:
    """The row of a model."""
    published = read_published(model)
    samples, cells = published["batch_size"], torus_cells(tokens)
    with torch.device("meta"):
        made: Any = MODELS[model](**published["model"])
    row: dict[str, Any] = {"model": model, "samples": samples, "tokens": tokens}
    work: StepWork
    if model == "dit":
        work = dit_work(made, batch(cells, samples), image_tokens)
    else:
        places = torch.cartesian_prod(*[torch.arange(8)] * 3)
        voxels = (8 * cells[:, None] + places)[torus_distances(cells).half().abs() < 1]
        work = vae_work(made, batch(cells, samples), batch(voxels, samples))
        row["voxels"] = len(voxels)
    checkpointing = published.get("gradient_checkpointing", False)
    return {**row, "checkpointing": checkpointing, "forward": work.forward, "step": work.step(checkpointing)}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=46_000, help="cells of a sample")
    parser.add_argument("--image_tokens", type=int, default=Sizes().image_tokens, help="that SparseDiT is given")
    args = parse_arguments(parser, __file__, arguments)
    args.device = "cpu"
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    report = {**describe_run(args), "rows": [count(model, args.tokens, args.image_tokens) for model in MODELS]}
    write_report(args.json, report)
    for row in report["rows"]:
        print(f"{row['model']:4} {row['forward'] / 1e12:8.1f} forward {row['step'] / 1e12:8.1f} a step, 10^12")
    return report


if __name__ == "__main__":
    main(parse_args())
