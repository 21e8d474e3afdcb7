"""
Claim 3: training at 1024^3 on 8 GPUs, where dense volumes of 256^3 take 32.

    python -m benchmarks.claims.volume --json benchmarks/results/claims_volume.json --plot docs/claims_volume.png

One training step (forward, backward, AdamW) with one shape and gradient checkpointing, under bfloat16 autocast on a
GPU: the published SparseDiT in the cells near a surface at 1024^3, with SSA and with full attention, and a DenseDiT of
the same width and depth in all cells of a volume at 256^3 and 1024^3. The median of the times, and the peak of memory.

What has more than `--most_tokens` tokens is counted, not measured. Time: the floating-point operations of the step
over those that the largest measured dense step achieves a second. Memory: the line through the smallest and the
largest measured dense step. "GPUs" are those that process as many shapes a second as 8 do with SparseDiT and SSA.

In favour of the dense transformer: its cells have 8^3 samples as the sparse ones have, so that 256^3 samples make
32,768 tokens (cells of 4^3, with more detail, are counted beside), and its attention has heads of 64, which kernels
are fastest at. In favour of SparseDiT: its tokens are planned once, and its surface is a torus, whose blocks are
filled evenly.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.result_files import describe_run, parse_arguments, write_report
from diffusers_sparse3d import DenseDiT, SparseDiT
from diffusers_sparse3d.sparse_tensor import CoordinateCache


# Forward, forward again for checkpointing, and twice as much backward.
PASSES = 4
GPUS = 8
FAILED = {"source": "failed", "error": "out of memory"}


@dataclass(frozen=True)
class Case:
    """
    A training step.

    Attributes:
        model: "sparse, SSA", "sparse, full attention" or "dense".
        resolution: samples per axis.
        cell: samples per axis of a cell.
        tokens: cells.
    """

    model: str
    resolution: int
    cell: int
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """
    The sizes of a run.

    Attributes:
        layers, heads, head_dim, kv_heads: of both transformers, but that the dense one has `dense_heads`.
        dense_heads: heads of dense attention, of the same width together.
        context: tokens of the image.
        channels: of a latent.
        sparse_tokens: cells near the surface at 1024^3.
        edges: cells per axis of the dense volumes, with the samples of each.
        norm_num_groups: of the compression blocks.
    """

    layers: int = 24
    heads: int = 32
    head_dim: int = 32
    kv_heads: int = 2
    dense_heads: int = 16
    context: int = 1374
    channels: int = 16
    sparse_tokens: int = 46_000
    edges: tuple[tuple[int, int], ...] = ((16, 8), (24, 8), (32, 8), (64, 4), (128, 8))
    norm_num_groups: int = 32

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def cases(self) -> list[Case]:
        """All steps, the dense ones in ascending order."""
        sparse = [Case(f"sparse, {name}", 1024, 8, self.sparse_tokens) for name in ("SSA", "full attention")]
        return sparse + [Case("dense", edge * cell, cell, edge**3) for edge, cell in self.edges]


TINY = Sizes(2, 2, 16, 1, 1, 6, 4, 60, ((2, 8), (3, 8), (4, 8), (8, 4)), 4)


def torus_cells(count: int, edge: int = 128) -> Tensor:
    """`[count, 4]` int32, the cells of a volume of `edge`^3 that are nearest to a torus, in ascending order."""
    axis = torch.arange(edge)
    grid = torch.cartesian_prod(axis, axis, axis)
    x, y, z = ((grid + 0.5) * 2 / edge - 1).unbind(1)
    distance = torch.hypot(torch.hypot(x, y) - 0.62, z).sub(0.22).abs()
    return torch.nn.functional.pad(grid[distance.argsort()[:count].sort().values], (1, 0)).int()


def make_step(case: Case, sizes: Sizes, device: str) -> tuple[Callable[[], None], int]:
    """A function that takes a training step of a case, and the number of parameters."""
    torch.manual_seed(0)
    common = {"in_channels": sizes.channels, "num_layers": sizes.layers, "cross_attention_dim": sizes.width}
    context = torch.randn(1, sizes.context, sizes.width, device=device)
    model: DenseDiT | SparseDiT
    inputs: tuple[Tensor, ...]
    options: dict[str, Any] = {}
    with torch.device(device):
        if case.model == "dense":
            edge = round(case.tokens ** (1 / 3))
            heads = {"num_attention_heads": sizes.dense_heads, "attention_head_dim": sizes.width // sizes.dense_heads}
            model = DenseDiT(sample_size=edge, **heads, **common)
            latents = torch.randn(1, sizes.channels, edge, edge, edge)
            inputs = (latents, torch.full((1,), 500.0), context)
        else:
            model = SparseDiT(
                sample_size=case.resolution // case.cell,
                num_attention_heads=sizes.heads,
                attention_head_dim=sizes.head_dim,
                num_key_value_heads=sizes.kv_heads,
                attention_type="ssa" if case.model == "sparse, SSA" else "full",
                sparse_conditioning=False,
                norm_num_groups=sizes.norm_num_groups,
                **common,
            )
            coords = torus_cells(case.tokens, case.resolution // case.cell).to(device)
            latents = torch.randn(case.tokens, sizes.channels)
            inputs = (latents, coords, torch.full((1,), 500.0), context)
            options = {"check_inputs": False, "cache": CoordinateCache(coords, 1)}
    model.train().enable_gradient_checkpointing()
    cuda = torch.device(device).type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    noise = torch.randn_like(latents)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda):
            velocity = model(*inputs, **options).sample
        (velocity.float() - noise + latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in model.parameters())


def measure(case: Case, sizes: Sizes, device: str, repeats: int) -> dict[str, Any]:
    """The seconds of a step, its peak memory in GiB on a GPU, and the number of parameters."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        # The step before may be held by cycles.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, parameters = make_step(case, sizes, device)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    # The first two compile kernels and make the moments of the optimizer.
    row: dict[str, Any] = {"seconds": statistics.median(times[2:]), "parameters": parameters}
    if cuda:
        row["gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def dense_operations(tokens: int, sizes: Sizes) -> float:
    """
    The floating-point operations of a training step of the dense transformer, with those of checkpointing.

    Multiplications and additions of the linear layers of the blocks, and of both attentions.
    """
    width, context = sizes.width, sizes.context
    own = 2 * (4 + 2 + 2 * 4) * width**2 + 4 * tokens * width + 4 * context * width
    return PASSES * sizes.layers * (tokens * own + context * 2 * 2 * width**2)


def count(case: Case, sizes: Sizes, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """
    The seconds and the memory of a dense step that is too large, from those that were measured.

    Args:
        case: the step.
        sizes: of the run.
        measured: rows of dense steps in ascending order, at least one.
    """
    first, last = measured[0], measured[-1]
    rate = dense_operations(last["tokens"], sizes) / last["seconds"]
    row = {"seconds": dense_operations(case.tokens, sizes) / rate, "operations_a_second": rate}
    if len(measured) > 1 and "gib" in last:
        slope = (last["gib"] - first["gib"]) / (last["tokens"] - first["tokens"])
        row["gib"] = last["gib"] + slope * (case.tokens - last["tokens"])
    return row


def with_gpus(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with "gpus", those that process as many shapes a second as 8 do with SparseDiT and SSA."""
    own = next((row["seconds"] for row in rows if row["model"] == "sparse, SSA" and "seconds" in row), None)
    return [{**row, "gpus": GPUS * row["seconds"] / own} if own and "seconds" in row else row for row in rows]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory of each step as bars, hatched where they are counted. Needs the package matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    labels = [f"{row['model']}, {row['resolution']}³, cells of {row['cell']}³" for row in rows]
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), (("seconds", "s a step"), ("gib", "GiB"))):
        values = [row.get(name) or 0 for row in rows]
        hatches = ["//" if row["source"] == "counted" else "" for row in rows]
        axes.barh(labels, values, color=["C0" if "sparse" in label else "C1" for label in labels], hatch=hatches)
        axes.set(xlabel=title, xscale="log" if any(values) else "linear")
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"{row['model']:>22} {row['resolution']:5}^3 {row['tokens']:10,} tokens {row['source']:>9}"
    if "error" in row:
        return f"{name}  {row['error']}"
    memory = f"{row['gib']:9.1f} GiB" if "gib" in row else ""
    return f"{name} {row['seconds']:10.3f} s {memory} {row.get('gpus', float('nan')):9.1f} GPUs"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most_tokens", type=int, default=50_000, help="of a step that is measured")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="tiny transformers, to try the command on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="picture to draw, as PNG")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Measure or count all steps, and write the report."""
    sizes = TINY if args.tiny else Sizes()
    report = {**describe_run(args), "rows": []}
    for case in sizes.cases():
        dense = [row for row in report["rows"] if row["model"] == "dense" and row["source"] == "measured"]
        row = {**vars(case), "source": "measured"}
        try:
            if case.tokens > args.most_tokens and dense:
                row |= {"source": "counted", **count(case, sizes, dense)}
            else:
                row |= measure(case, sizes, args.device, args.repeats)
        except torch.OutOfMemoryError:
            row |= {"source": "counted", **count(case, sizes, dense)} if dense else FAILED
        report["rows"] = with_gpus([*report["rows"], row])
        write_report(args.json, report)
        print(describe(report["rows"][-1]), flush=True)
    if args.plot:
        plot(report["rows"], args.plot)
    return report


if __name__ == "__main__":
    main(parse_args())
