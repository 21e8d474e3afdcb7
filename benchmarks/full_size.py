"""
Times every stage from an image to the mesh of the last stage, and its peak memory, with models of the published sizes.

    python benchmarks/full_size.py --work DIR --peer --json full_size.json
    python benchmarks/full_size.py --work DIR --offload --json full_size_offload.json
    python benchmarks/full_size.py --work DIR --recipe low_memory --json full_size_low_memory.json

The weights are random: a release folder is made in DIR by `conversion/make_random_release.py` and converted, unless it
is there. What random weights generate has no sensible shape, so the sparse stages get the cells of a mesh, and
marching cubes its signed distances; every model and every other step runs as in a call of the pipeline. The distances
of the mesh, which no generation computes, do not count. Without `--mesh`, the meshes are tori with some 10,600 cells
at 512^3, the paper's mean, and 43,700 at 1024^3. A call of one step a stage comes first: it compiles kernels, and
counts the floor of each step (`floors.py`).
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trimesh
from torch import Tensor

from benchmark_meshes import load_or_torus
from diffusers_sparse3d import SparseTensor
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from diffusers_sparse3d.loaders.convert import convert
from diffusers_sparse3d.loaders.random_release import IMAGE_ENCODER_FILE, make_release
from diffusers_sparse3d.pipelines.stages import SparseStage, Stage
from floors import FloorCounter
from mesh_pipeline import MeshPipeline
from result_files import describe_run, parse_arguments, write_report


# Published seconds from one picture to the shape of 1024^3, by systems with comparable stages, as they state them.
PEERS = {
    "TRELLIS.2, H100, 9.6k tokens in a format of its own": 10.0,
    "a port of it with step caches and fewer tokens, consumer GPU, with texture": 6.2,
}
# Of the tube of the torus at 1024^3.
TUBE_1024 = 0.131


class StagedPipeline(MeshPipeline):
    """Measures its steps, and goes on with a real mesh where random weights have made something else."""

    counter: FloorCounter | None
    # Seconds by step and GPU, of one denoising step where there are several.
    floors: dict[str, dict[str, float]]
    rows: list[dict[str, Any]]
    # Spent on what takes the place of what random weights generate.
    seconds_apart: float

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """The result of a function; seconds and peak memory become a row of the table."""
        cuda = torch.cuda.is_available()
        if self.counter is not None:
            self.counter.take()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function()
        if cuda:
            torch.cuda.synchronize()
        row = {"step": name, "seconds": time.perf_counter() - start}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        if self.counter is not None:
            self.floors[name] = self.counter.take()
        steps = self.num_timesteps if name.endswith("denoising") else 1
        row["floors"] = {gpu: steps * floor for gpu, floor in self.floors[name].items()}
        self.rows.append(row)
        memory = f"{row['peak_gib']:8.2f}" if cuda else f"{'-':>8}"
        floor = row["floors"]["NVIDIA H200"]
        print(f"{name:32} {row['seconds']:9.3f} {memory} {floor:9.3f}", flush=True)
        return result

    def measure_method(self, component: str, method: str) -> None:
        """Every call of a method of a component becomes a row."""
        model = getattr(self, component)
        function = getattr(model, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            return self.measure(f"{component}.{method}", lambda: function(*args, **kwargs))

        setattr(model, method, measured)

    def cells(self, resolution: int, device: torch.device) -> Tensor:
        """`[N, 4]` int32 cells of the mesh at a resolution."""
        cells = super().cells(resolution, device)
        print(f"{len(cells)} cells of the mesh at {resolution}^3")
        return cells

    def encode_image(self, *args: Any) -> tuple[dict[str, Tensor], ...]:
        """The conditioning of each stage."""
        encode = super().encode_image
        return self.measure("image tokens", lambda: encode(*args))

    def denoise(self, stage: Stage, *args: Any) -> Tensor:
        """The denoised latents of a stage."""
        denoise = super().denoise
        return self.measure(f"{stage.name}: denoising", lambda: denoise(stage, *args))

    def extract_meshes(
        self, stage: SparseStage, latents: Tensor, coords: Tensor, batch_size: int, *surface: Any
    ) -> list[trimesh.Trimesh]:
        """The mesh, by marching cubes on its own signed distances; those of the latents are decoded beforehand."""
        (decoded,) = self.decode(stage, latents, coords, batch_size)
        start = time.perf_counter()
        sdf = mesh_to_sparse_sdf(
            self.meshes[stage.resolution], stage.resolution, normalize=False, device=str(coords.device)
        )
        real = SparseTensor(sdf.feats.to(coords.device), sdf.coords.to(coords.device))
        self.seconds_apart += time.perf_counter() - start
        mesh = self.measure(
            f"{stage.name}: SDF to mesh", lambda: sparse_sdf_to_mesh(real.feats, real.coords, stage.resolution)
        )
        print(f"{len(decoded.feats)} decoded samples; {len(mesh.faces)} faces of the mesh")
        return [mesh]

    def find_cells(
        self, stage: SparseStage, finer_stage: SparseStage, latents: Tensor, coords: Tensor, *args: Any
    ) -> Tensor:
        """The cells of the mesh in the grid of `finer_stage`."""
        self.extract_meshes(stage, latents, coords, 1, 0.0)
        resolution = finer_stage.resolution
        return self.measure(f"{finer_stage.name}: cells", lambda: self.cells(resolution, coords.device))


def prepare(work: Path, tiny: bool, variant: str | None) -> Path:
    """The folder of the converted pipeline."""
    release, converted = work / "release", work / ("converted-" + (variant or "float32"))
    if not release.exists():
        make_release(release, tiny=tiny)
    if not converted.exists():
        convert(release, converted, variant, release / IMAGE_ENCODER_FILE)
    return converted


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights, about 20 GB")
    parser.add_argument("--mesh", help="whose cells the sparse stages generate in; a torus if none is given")
    parser.add_argument("--image", default="examples/armchair.png")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--refiner_dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the refiners, whose convolutions cuDNN computes faster in float16; by default that of the others",
    )
    parser.add_argument("--dense_steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--steps_1024", type=int, default=15)
    parser.add_argument("--offload", action="store_true", help="with enable_model_cpu_offload()")
    parser.add_argument("--recipe", choices=("low_memory",), help="settings of docs/speed_and_memory.md")
    parser.add_argument("--peer", action="store_true", help="print the published seconds of other systems, too")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    variant = None if args.dtype == "float32" else "fp16"
    folder = prepare(args.work, args.tiny, variant)
    start = time.perf_counter()
    dtypes = {"default": getattr(torch, args.dtype)}
    if args.refiner_dtype:
        dtypes |= dict.fromkeys(("refiner", "refiner_1024"), getattr(torch, args.refiner_dtype))
    pipeline = StagedPipeline.from_pretrained(folder, variant=variant, torch_dtype=dtypes)
    first, last = pipeline.resolutions
    pipeline.meshes = {first: load_or_torus(args.mesh), last: load_or_torus(args.mesh, TUBE_1024)}
    pipeline.floors = {}
    if args.recipe == "low_memory":
        pipeline.enable_vae_tiling()
        pipeline.disable_guidance_batching()
        pipeline.disable_cuda_graphs()
    if args.offload or args.recipe == "low_memory":
        pipeline.enable_model_cpu_offload(device=args.device)
    else:
        pipeline.to(args.device)
    loading = time.perf_counter() - start
    for component, method in (("vae", "decode"), ("refiner", "refine")):
        pipeline.measure_method(component, method)
        pipeline.measure_method(f"{component}_1024", method)
    pipeline.set_progress_bar_config(disable=True)
    totals = []
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for steps in ((1, 1, 1), (args.dense_steps, args.steps, args.steps_1024)):
        print(f"{'step':32} {'seconds':>9} {'peak GiB':>8} {'floor':>9}")
        pipeline.rows, pipeline.seconds_apart = [], 0.0
        pipeline.counter = None if totals else FloorCounter()
        start = time.perf_counter()
        with pipeline.counter.counting(*models) if pipeline.counter else contextlib.nullcontext():
            pipeline(
                args.image,
                generator=torch.Generator(args.device).manual_seed(0),
                dense_num_inference_steps=steps[0],
                num_inference_steps=steps[1],
                num_inference_steps_1024=steps[2],
            )
        totals.append(time.perf_counter() - start - pipeline.seconds_apart)
        print(f"{'all steps':32} {totals[-1]:9.3f}")
    print(f"{'loading':32} {loading:9.3f}")
    report = describe_run(args) | {"loading": loading, "first_call_of_one_step": totals[0], "total": totals[1]}
    report["steps"] = pipeline.rows
    if args.peer:
        report["peers"] = PEERS
        for system, seconds in PEERS.items():
            print(f"published: {seconds:.1f} s, {system}")
    write_report(args.json, report)
    return report


if __name__ == "__main__":
    main(parse_args())
