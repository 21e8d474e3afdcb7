"""
What quantised weights of the transformers save and cost, by scheme.

    python benchmarks/quantization.py --json quantization.json

The transformers of the shipped pipeline are quantised as they are loaded, by `PipelineQuantizationConfig` of
diffusers; the meshes of a scheme are compared with those of the same photo and seed without (F1 at 0.05, and the
Chamfer distance, in model space [-1, 1]^3). Other seeds are compared as well: so much two answers to one photo differ.
A scheme whose package is missing, or that does not run on the device, is a row that says so. With `--limit`, every
scheme has a process of its own, which is ended after so many seconds, and five times as many for that without: it
compiles the kernels. Shortly before, it prints what it is doing. On a GPU, each mesh is generated twice and the second
one is timed: another number of cells may need kernels that are still to be compiled. Seconds on a CPU are those of the
processor.
"""

import argparse
import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, QuantoConfig, TorchAoConfig

from cache_recipes import F1_THRESHOLD, RECIPES, ROOT, Bench, compare, compare_seeds, format_cells
from diffusers_sparse3d import Direct3DS2Pipeline
from diffusers_sparse3d.geometry.mesh import load_mesh
from result_files import describe_run, parse_arguments, write_report


def torchao(name: str) -> Callable[[], Any]:
    """Makes the configuration of a scheme of torchao."""
    return lambda: TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


SCHEMES: dict[str, Callable[[], Any] | None] = {
    "none": None,
    "torchao, int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao, int8 weights and tokens": torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto, int8 weights": lambda: QuantoConfig(weights_dtype="int8"),
    "bitsandbytes, int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    ),
}
TRANSFORMERS = ("transformer", "dense_transformer")


def load(args: argparse.Namespace, scheme: str) -> Direct3DS2Pipeline:
    """The pipeline with its transformers quantised."""
    make = SCHEMES[scheme]
    options: dict[str, Any] = {"torch_dtype": getattr(torch, args.dtype)}
    if make is not None:
        options["quantization_config"] = PipelineQuantizationConfig(
            quant_mapping={name: make() for name in TRANSFORMERS}
        )
    pipeline = Direct3DS2Pipeline.from_pretrained(args.model, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)


def weight_mib(model: torch.nn.Module) -> float:
    """MiB of all that a model holds, quantised tensors by what they are made of."""
    return sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()]) / 2**20


def _bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def exact_file(folder: Path, image: Path, seed: int) -> Path:
    """Where the mesh without quantisation is kept, for comparisons."""
    return folder / f"{image.stem}-{seed}.ply"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/direct3d-s2-small"))
    photos = [ROOT / "examples" / f"{name}.png" for name in ("sofa", "stool")]
    parser.add_argument("--images", type=Path, nargs="+", default=photos)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--limit", type=float, help="seconds of a scheme, in a process of its own")
    parser.add_argument("--worker", choices=SCHEMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    report = describe_run(args) | {"f1_threshold": F1_THRESHOLD, "rows": []}
    print(f"{'scheme':34} {'MiB':>6} {'GiB':>6} {'seconds':>8} {'F1':>6} {'Chamfer':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for scheme in ["none", *(scheme for scheme in args.schemes if scheme != "none")]:
            row = {"scheme": scheme, **(measure if args.limit is None else measure_apart)(args, scheme, folder)}
            if scheme == "none" and "error" in row:
                raise RuntimeError(f"the pipeline without quantisation does not run: {row['error']}")
            report["rows"].append(row)
            print_row(row)
            write_report(args.json, report)
        if len(args.seeds) > 1:
            runs = [(image, seed) for image in args.images for seed in args.seeds]
            exact = {run: load_mesh(exact_file(folder, *run)) for run in runs}
            report["other_seed"] = compare_seeds(exact, args.images, args.seeds)
            print_row({"scheme": "none, other seed", **report["other_seed"]})
            write_report(args.json, report)
    return report


def measure(args: argparse.Namespace, scheme: str, folder: Path) -> dict[str, Any]:
    """The figures of a scheme, or its error; meshes of the scheme "none" are put into the folder."""
    try:
        return figures(args, scheme, folder)
    # Whatever a package of others raises is what a user would see.
    except Exception as error:
        traceback.print_exc(limit=-5)
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def measure_apart(args: argparse.Namespace, scheme: str, folder: Path) -> dict[str, Any]:
    """The same in a process of its own, which is ended after the limit."""
    limit = 5 * args.limit if scheme == "none" else args.limit
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", scheme, "--folder", str(folder)]
    command += ["--model", str(args.model), "--images", *map(str, args.images), "--seeds", *map(str, args.seeds)]
    command += ["--dtype", args.dtype, "--device", args.device, "--limit", str(limit)]
    start = time.perf_counter()
    try:
        result = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {limit:g} s"}
    file = folder / "figures.json"
    if result.returncode or not file.exists():
        return {"error": f"the process ended with {result.returncode}"}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found | {"process_seconds": time.perf_counter() - start}


def figures(args: argparse.Namespace, scheme: str, folder: Path) -> dict[str, Any]:
    """What is measured of a scheme."""
    cuda = torch.device(args.device).type == "cuda"
    bench = Bench(load(args, scheme), args.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        bench.generate(RECIPES["half the steps"], args.images[0], args.seeds[0])
    runs = []
    for image in args.images:
        for seed in args.seeds:
            if cuda:
                bench.generate(RECIPES["exact"], image, seed)
            mesh, run = bench.generate(RECIPES["exact"], image, seed)
            if scheme == "none":
                mesh.export(exact_file(folder, image, seed))
            else:
                run |= compare(mesh, load_mesh(exact_file(folder, image, seed)))
            runs.append({"image": image.stem, "seed": seed, **run})
    row = {"mib": sum(weight_mib(getattr(bench.pipeline, name)) for name in TRANSFORMERS), "runs": runs}
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row | {key: mean(run[key] for run in runs) for key in runs[0] if key not in ("image", "seed")}


def print_stack_after(seconds: float) -> None:
    """Print what this process is doing, when so many seconds have passed; 0 for never."""
    signal.signal(signal.SIGALRM, lambda _, frame: traceback.print_stack(frame))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def print_row(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"{row['scheme']:34} {row['error']}", flush=True)
        return
    formats = {"mib": (6, 1), "peak_gib": (6, 2), "seconds": (8, 2), "f1": (6, 3), "chamfer": (8, 4)}
    print(f"{row['scheme']:34}", format_cells(row, formats), flush=True)


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.worker is None:
        main(arguments)
    else:
        if arguments.limit is not None:
            print_stack_after(0.95 * arguments.limit)
        write_report(arguments.folder / "figures.json", measure(arguments, arguments.worker, arguments.folder))
        print_stack_after(0)
