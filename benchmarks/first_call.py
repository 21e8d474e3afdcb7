"""
Seconds until the first result of a new process: importing, loading, the first call and the second one.

    python benchmarks/first_call.py --work DIR --json benchmarks/results/first_call.json

The models are those of the published sizes with random weights, as in `full_size.py`, and calls are of one step a
stage. Processes run one after the other: with an empty cache of triton's kernels and with the one that the process
before has filled; and each of both as shipped, where kernels are compiled ahead, many at a time, and with
`DIFFUSERS_SPARSE3D_RUNTIME=no-compile-ahead`, where a call waits for each. What takes the place of what random weights
generate does not count: the cells near the surface of a mesh. Modules and weights are read from disk once before.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from new_process import add_worker_option, seconds_of
from result_files import describe_run, parse_arguments, write_report


RUNS = {"compiled ahead": "", "one by one": "no-compile-ahead"}
CACHES = ("empty", "filled")


def variant_of(device: str) -> str | None:
    """Of the weights: half precision on a GPU."""
    return None if device == "cpu" else "fp16"


def work(args: argparse.Namespace) -> None:
    """What a process does; prints its seconds as JSON."""
    start = time.perf_counter()
    import torch

    from benchmark_meshes import load_or_torus
    from full_size import TUBE_1024, prepare
    from mesh_pipeline import MeshPipeline

    class TimedPipeline(MeshPipeline):
        apart = 0.0

        def cells(self, resolution: int, device: torch.device) -> torch.Tensor:
            begin = time.perf_counter()
            cells = super().cells(resolution, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.apart += time.perf_counter() - begin
            return cells

        def find_cells(self, stage: Any, finer_stage: Any, latents: Any, coords: Any, *_: Any) -> torch.Tensor:
            [*self.decode(stage, latents, coords, 1)]
            return self.cells(finer_stage.resolution, coords.device)

    seconds = {"imports": time.perf_counter() - start}
    start = time.perf_counter()
    cuda = torch.device(args.device).type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    refiners = dict.fromkeys(("refiner", "refiner_1024"), torch.float16 if cuda else torch.float32)
    variant = variant_of(args.device)
    folder = prepare(args.work, args.tiny, variant)
    pipeline = TimedPipeline.from_pretrained(folder, variant=variant, torch_dtype={"default": dtype, **refiners})
    pipeline.to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    first, last = pipeline.resolutions
    pipeline.meshes = {first: load_or_torus(args.mesh), last: load_or_torus(args.mesh, TUBE_1024)}
    seconds["loading"] = time.perf_counter() - start
    names = ("dense_num_inference_steps", "num_inference_steps", "num_inference_steps_1024")
    for call in ("first call", "second call"):
        start, pipeline.apart = time.perf_counter(), 0.0
        generator = torch.Generator(args.device).manual_seed(0)
        pipeline(args.image, generator=generator, output_type="sdf", **dict.fromkeys(names, 1))
        if cuda:
            torch.cuda.synchronize()
        seconds[call] = time.perf_counter() - start - pipeline.apart
    print(json.dumps(seconds))


def run(args: argparse.Namespace, cache: str, settings: str) -> dict[str, float]:
    """The seconds of a new process.

    Args:
        args: of the command.
        cache: folder of triton's cache.
        settings: of the runtime.
    """
    arguments = ["--work", str(args.work), "--device", args.device, "--image", args.image, *["--tiny"] * args.tiny]
    arguments += ["--mesh", args.mesh] if args.mesh else []
    return seconds_of(__file__, arguments, cache, settings)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights, about 20 GB")
    parser.add_argument("--mesh", help="whose cells the sparse stages generate in; a torus if none is given")
    parser.add_argument("--image", default="examples/armchair.png")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters, to try the script")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    add_worker_option(parser)
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.worker:
        work(args)
        return {}
    from full_size import prepare

    for weights in prepare(args.work, args.tiny, variant_of(args.device)).rglob("*.safetensors"):
        weights.read_bytes()
    rows: list[dict[str, Any]] = []
    for name, settings in RUNS.items():
        with tempfile.TemporaryDirectory() as cache:
            for state in CACHES:
                rows.append({"kernels": name, "cache": state, **run(args, cache, settings)})
                print(json.dumps(rows[-1]), flush=True)
                write_report(args.json, report := {**describe_run(args), "rows": rows})
    return report


if __name__ == "__main__":
    main(parse_args())
