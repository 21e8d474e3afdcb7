"""
Times the submanifold convolution on shells of voxels, beside plain PyTorch and the floors of the hardware.

    python benchmarks/sparse_conv.py --json sparse_conv.json
    python benchmarks/sparse_conv.py --tune --cases 1024-32 --json tuning.json

A shell: the voxels i of a grid of resolution R whose centres p = i - R / 2 + 0.5 have | |p| - 0.46 R | < thickness.
Times are medians after warm-up, in milliseconds, by CUDA events on a GPU. "all" is neighbour map and forward pass from
bare coordinates without gradients, "step" map, forward and backward pass; "bwd parts" are the gradients of the
features, of the weight and of the bias, each by itself. Floors: every feature and the map once at the bandwidth given,
the products of existing neighbours at the throughput given (by default those of an H200). `--tune` times the parts of
the backward pass and candidates for the tile shapes of each kernel.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_sparse3d.ops.sparse_conv import sparse_conv3d, sparse_subdivide_conv3d
from diffusers_sparse3d.ops.sparse_conv.reference import sparse_conv3d_reference, sparse_subdivide_conv3d_reference
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from result_files import describe_run, parse_arguments, write_report


@dataclass(frozen=True)
class Case:
    """A shell and a layer on it; `subdivide` convolves the eight children of every voxel."""

    resolution: int
    thickness: float
    channels: int
    subdivide: bool = False

    @property
    def name(self) -> str:
        return f"{self.resolution}-{self.channels}" + "-subdivide" * self.subdivide


CASES = [
    Case(128, 1.0, 512),
    Case(256, 1.0, 128),
    Case(512, 1.5, 64),
    Case(1024, 2.0, 32),
    Case(512, 1.5, 16),
    Case(512, 1.5, 32),
    Case(1024, 2.0, 16),
    Case(1024, 2.0, 64),
    Case(512, 1.5, 32, subdivide=True),
]
TINY_CASES = [Case(4, 0.7, 16), Case(4, 0.7, 16, subdivide=True)]


def shell(resolution: int, thickness: float, device: str) -> Tensor:
    """`[N, 4]` int32 voxels of the shell, ascending."""
    axis = torch.arange(resolution, device=device) - resolution / 2 + 0.5
    slabs = []
    for start in range(0, resolution, 16):
        x = axis[start : start + 16]
        radius = (x[:, None, None].square() + axis[:, None].square() + axis.square()).sqrt()
        voxels = ((radius - 0.46 * resolution).abs() < thickness).nonzero()
        voxels[:, 0] += start
        slabs.append(torch.nn.functional.pad(voxels, (1, 0)).int())
    return torch.cat(slabs)


def milliseconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a call, after two calls that are not counted."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times[2:])[repeats // 2]


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> tuple[CoordinateCache, list[Tensor]]:
    """The voxels, and feats, weight and bias that want gradients."""
    cache = CoordinateCache(shell(case.resolution, case.thickness, device), 1)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((len(cache.coords), case.channels), (27, case.channels, case.channels), (case.channels,))
    tensors = [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for shape in shapes]
    return cache, tensors


def backward_times(output: Tensor, leaves: list[Tensor], args: argparse.Namespace) -> float:
    """The time that the gradients of these leaves take."""
    grad_output = torch.randn_like(output)
    return milliseconds(
        lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True), args.device, args.repeats
    )


def backward_parts(
    convolve: Callable[..., Tensor], leaves: list[Tensor], cache: CoordinateCache, args: argparse.Namespace
) -> dict[str, float]:
    """The gradient of each leaf by itself: an operator makes all gradients that it was recorded for."""
    times = {}
    for wanted, name in enumerate(("backward_feats", "backward_weight", "backward_bias")):
        only = [leaf.detach().requires_grad_(number == wanted) for number, leaf in enumerate(leaves)]
        times[name] = backward_times(convolve(*only, cache), [only[wanted]], args)
    return times


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    device, dtype, repeats = args.device, getattr(torch, args.dtype), args.repeats
    cache, leaves = make_inputs(case, device, dtype)
    feats, weight, _ = leaves
    convolve: Callable[..., Tensor] = sparse_subdivide_conv3d if case.subdivide else sparse_conv3d
    plain = sparse_subdivide_conv3d_reference if case.subdivide else sparse_conv3d_reference

    def times(function: Callable[..., Tensor], *derived: Any) -> tuple[float, float]:
        with torch.no_grad():
            forward = milliseconds(lambda: function(*leaves, *derived), device, repeats)
        return forward, backward_times(function(*leaves, *derived), leaves, args)

    def everything() -> Tensor:
        return convolve(*leaves, CoordinateCache(cache.coords, 1))

    row = {"case": case.name, "voxels": len(cache.coords), "channels": case.channels}
    row["map"] = milliseconds(lambda: CoordinateCache(cache.coords, 1).neighbour_map(), device, repeats)
    row["forward"], row["backward"] = times(convolve, cache)
    with torch.no_grad():
        row["all"] = milliseconds(everything, device, repeats)
    row["step"] = milliseconds(lambda: torch.autograd.grad(everything().sum(), leaves), device, repeats)
    row |= backward_parts(convolve, leaves, cache, args)
    neighbours = cache.neighbour_map()
    if not args.no_plain:
        row["plain_forward"], row["plain_backward"] = times(plain, neighbours)
    pairs = int((neighbours < len(feats)).sum())
    if case.subdivide:
        # A child meets 8 parents, fewer where they are missing: as many as there are (child, corner) pairs.
        corners = torch.tensor([2 if axis == 1 else 1 for axis in (0, 1, 2)])
        per_offset = (corners[:, None, None] * corners[:, None] * corners).flatten().to(neighbours)
        pairs = int(((neighbours < len(feats)).sum(1) * per_offset).sum())
    outputs = 8 if case.subdivide else 1
    operations = 2 * pairs * weight.shape[1] * weight.shape[2]
    row_bytes = case.channels * feats.element_size()
    forward_bytes = len(feats) * ((1 + outputs) * row_bytes + 27 * neighbours.element_size())
    backward_bytes = forward_bytes + len(feats) * row_bytes
    row["forward_floor_bytes"] = forward_bytes / args.bandwidth / 1e9
    row["forward_floor_operations"] = operations / args.throughput / 1e9
    row["backward_floor_bytes"] = backward_bytes / args.bandwidth / 1e9
    row["backward_floor_operations"] = 2 * operations / args.throughput / 1e9
    return row


# A product waits for the places of rows, and then for the rows: of an odd number of stages, either takes half.
def convolution_candidates(channels: int, tiny: bool) -> Iterator[Any]:
    """Tile shapes of the forward pass and the gradient of the input."""
    from diffusers_sparse3d.ops.sparse_conv.kernels.convolution import ConvolutionShape

    if tiny:
        yield from (ConvolutionShape(16, 16, 16, 4, 1, by_mask) for by_mask in (False, True))
    elif channels > 64:
        if channels > 128:
            for depth, stages in ((64, 3), (64, 5), (32, 5), (32, 7)):
                yield ConvolutionShape(128, 256, depth, 8, stages, True)
        for depth, stages in ((64, 3), (64, 5), (64, 7), (32, 7), (128, 3)):
            yield ConvolutionShape(128, 128, depth, 8, stages, True)
        yield ConvolutionShape(256, 128, 64, 8, 5, True)
        yield ConvolutionShape(64, 128, 64, 4, 5, True)
        yield ConvolutionShape(128, 128, 64, 8, 5, False)
    else:
        for rows, stages in itertools.product((64, 128, 256), (3, 5, 7)):
            yield ConvolutionShape(rows, channels, channels, 4, stages, False)
        yield ConvolutionShape(256, channels, channels, 8, 3, False)


def gradient_candidates(channels: int, tiny: bool) -> Iterator[Any]:
    """Tile shapes of the gradient of the weights."""
    from diffusers_sparse3d.ops.sparse_conv.kernels.weight_gradient import GradientShape

    if tiny:
        yield from (GradientShape(1, 16, 16, 16, 4, 1, by_pairs) for by_pairs in (False, True))
    elif channels > 64:
        for columns in (256, 128) if channels > 128 else (128,):
            for rows, stages in ((64, 3), (64, 5), (32, 5), (32, 7), (32, 9)):
                yield GradientShape(1, 128, columns, rows, 8, stages, True)
        yield GradientShape(1, 128, 128, 128, 8, 3, True)
        yield GradientShape(1, 128, 128, 64, 4, 3, True)
    else:
        steps = {
            256: ((64, 3), (64, 5), (128, 3), (32, 5)),
            128: ((64, 3), (64, 5), (128, 3)),
            512: ((64, 3), (32, 5)),
        }
        for width, shapes in steps.items():
            for rows, stages in shapes:
                warps = 4 if width == 128 else 8
                yield GradientShape(width // channels, channels, channels, rows, warps, stages, False)
        if channels == 64:
            yield GradientShape(1, channels, channels, 128, 4, 5, True)


def tune(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each kernel of the layer, every candidate with its time, the best first, and the one that ships."""
    from triton.runtime.errors import OutOfResources

    from diffusers_sparse3d.ops.sparse_conv.kernels import common, convolution, weight_gradient
    from diffusers_sparse3d.ops.sparse_conv.plan import ConvolutionPlan, GradientPlan
    from diffusers_sparse3d.ops.sparse_conv.reference import corner_weight

    cache, leaves = make_inputs(case, args.device, getattr(torch, args.dtype))
    convolve: Callable[..., Tensor] = sparse_subdivide_conv3d if case.subdivide else sparse_conv3d
    parts = backward_parts(convolve, leaves, cache, args)
    print(case.name, ", ".join(f"{name} {elapsed:.3f} ms" for name, elapsed in parts.items()), flush=True)
    feats, weight, bias = (leaf.detach() for leaf in leaves)
    kinds = {"forward": common.SAME}
    if case.subdivide:
        weight = corner_weight(weight).permute(2, 0, 1, 3).contiguous()
        kinds = {"forward": common.SUBDIVIDE, "input gradient": common.MERGE}
    grad_output = feats.repeat_interleave(8, 0) if case.subdivide else feats
    settings = (case.channels, case.channels, feats.dtype)

    def convolve_by(inputs: Tensor, kind: Any) -> Callable[[Any, Any], Tensor]:
        return lambda shape, plan: convolution.convolve(inputs, weight, bias, plan, shape, kind)

    kernels: list[tuple[str, Callable[[Any, Any], Tensor], Any, Iterator[Any]]] = [
        (
            kernel,
            convolve_by(grad_output if kernel == "input gradient" else feats, kind),
            convolution.convolution_shape(*settings),
            convolution_candidates(case.channels, args.tiny),
        )
        for kernel, kind in kinds.items()
    ]
    kernels.append(
        (
            "weight gradient",
            lambda shape, plan: weight_gradient.weight_gradient(
                feats, grad_output, plan, shape, common.SUBDIVIDE if case.subdivide else common.SAME
            ),
            weight_gradient.gradient_shape(*settings),
            gradient_candidates(case.channels, args.tiny),
        )
    )
    reports = []
    for kernel, run, default, candidates in kernels:
        start, tried = time.perf_counter(), []
        for shape in [default, *candidates]:
            if time.perf_counter() - start > args.budget:
                print(f"{case.name} {kernel}: time is up, candidates are left")
                break
            plan: ConvolutionPlan | GradientPlan
            if kernel == "weight gradient":
                plan = GradientPlan.of(cache, shape.by_pairs)
            else:
                plan = ConvolutionPlan.of(cache, shape.by_mask)
            try:
                elapsed = milliseconds(functools.partial(run, shape, plan), args.device, args.repeats)
            except OutOfResources:
                continue
            tried.append({"milliseconds": elapsed, **asdict(shape)})
        shipped = tried[0]
        tried.sort(key=lambda entry: entry["milliseconds"])
        best = {name: value for name, value in tried[0].items() if name != "milliseconds"}
        print(
            f"{case.name} {kernel}: {shipped['milliseconds']:.3f} ms as shipped, "
            f"{tried[0]['milliseconds']:.3f} ms with {best}",
            flush=True,
        )
        reports.append({"case": case.name, "kernel": kernel, "best": tried[0], "shipped": shipped, "tried": tried})
    return reports


def print_row(row: dict[str, Any]) -> None:
    def cells(*names: str) -> str:
        return " / ".join(f"{row[name]:.2f}" if name in row else "-" for name in names)

    columns = (
        f"{row['case']:>18} {row['voxels']:>11,}",
        f"{cells('map'):>8} {cells('forward'):>9} {cells('backward'):>9} {cells('all'):>9} {cells('step'):>9}",
        f"{cells('backward_feats', 'backward_weight', 'backward_bias'):>21}",
        f"{cells('plain_forward', 'plain_backward'):>18}",
        f"{cells('forward_floor_bytes', 'forward_floor_operations'):>13}",
        f"{cells('backward_floor_bytes', 'backward_floor_operations'):>14}",
    )
    print("  ".join(columns), flush=True)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no_plain", action="store_true", help="without the plain PyTorch path")
    parser.add_argument("--tune", action="store_true", help="time candidates of the tile shapes instead")
    parser.add_argument("--budget", type=float, default=60, help="seconds for the candidates of one kernel")
    parser.add_argument("--throughput", type=float, default=783, help="TFLOP/s of matrix products")
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s of memory")
    parser.add_argument("--tiny", action="store_true", help="a few dozen voxels, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    cases = TINY_CASES if args.tiny else [case for case in CASES if case.name in args.cases]
    results = []
    if not args.tune:
        print(
            f"{'case':>18} {'voxels':>11}  {'map':>8} {'forward':>9} {'backward':>9} {'all':>9} {'step':>9}", end="  "
        )
        print(f"{'bwd parts':>21}  {'plain fwd / bwd':>18}", end="  ")
        print(f"{'fwd floors':>13}  {'bwd floors':>14}   ms; floors: bytes / operations")
    for case in cases:
        if args.tune:
            results += tune(case, args)
        else:
            results.append(measure(case, args))
            print_row(results[-1])
    report = describe_run(args) | {"results": results}
    write_report(args.json, report)
    return report


if __name__ == "__main__":
    main(parse_args())
