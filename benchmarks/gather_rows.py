"""
Times copies of narrow rows by index, as the sparse convolution makes them, beside the matrix product that follows.

    python benchmarks/gather_rows.py --json gather_rows.json
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch

from diffusers_sparse3d.ops.gather import take_rows
from result_files import describe_run, parse_arguments, write_report


def milliseconds(function: Callable[[], torch.Tensor], device: str, repeats: int) -> float:
    """Median time of a call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[2:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--voxels", type=int, default=1_180_000)
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=7)
    args = parse_arguments(parser, __file__)

    # Neighbours in a grid are near each other in memory too: constant offsets, as in a block of voxels.
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(-3000, 3000, (27,), generator=generator)
    rows = (torch.arange(args.voxels)[:, None] + offsets).clamp(0, args.voxels - 1).flatten().to(args.device)
    results = []
    print(f"{'channels':>8} {'index_select':>13} {'take_rows':>10} {'product':>8}   ms")
    for channels in args.channels:
        feats = torch.randn(args.voxels, channels, device=args.device).bfloat16()
        weight = torch.randn(27 * channels, channels, device=args.device).bfloat16()
        gathered = feats.index_select(0, rows).view(args.voxels, 27 * channels)
        functions = {
            "index_select": functools.partial(torch.index_select, feats, 0, rows),
            "take_rows": functools.partial(take_rows, feats, rows),
            "product": functools.partial(torch.mm, gathered, weight),
        }
        times = {name: milliseconds(function, args.device, args.repeats) for name, function in functions.items()}
        results.append({"channels": channels, **times})
        print(f"{channels:8} {times['index_select']:13.2f} {times['take_rows']:10.2f} {times['product']:8.2f}")
    write_report(args.json, describe_run(args) | {"milliseconds": results})


if __name__ == "__main__":
    main()
