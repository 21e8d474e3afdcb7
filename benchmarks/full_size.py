"""
Times every stage from an image to the mesh of the last stage, and its peak memory, with models of the published sizes.

    python benchmarks/full_size.py --work DIR --mesh MESH --json full_size.json
    python benchmarks/full_size.py --work DIR --mesh MESH --offload --json full_size_offload.json

The weights are random: a release folder is made in DIR by `conversion/make_random_release.py` and converted, unless it
is there. What random weights generate has no sensible shape, so the sparse stages get the cells of MESH, and marching
cubes its signed distances; every model and every other step is what a call of the pipeline runs.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from diffusers_sparse3d import Direct3DS2Pipeline, SparseTensor
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import load_mesh, normalize_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface
from result_files import describe_run, parse_arguments, write_report


CONVERSION = Path(__file__).parents[1] / "conversion"


class StagedPipeline(Direct3DS2Pipeline):
    """Measures its steps, and goes on with a real mesh where random weights have made something else."""

    mesh: trimesh.Trimesh
    rows: list[dict[str, Any]]

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """The result of a function; seconds and peak memory become a row of the table."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function()
        if cuda:
            torch.cuda.synchronize()
        row = {"step": name, "seconds": time.perf_counter() - start}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        self.rows.append(row)
        memory = f"{row['peak_gib']:8.2f}" if cuda else f"{'-':>8}"
        print(f"{name:32} {row['seconds']:9.3f} {memory}", flush=True)
        return result

    def measure_method(self, component: str, method: str) -> None:
        """Every call of a method of a component becomes a row."""
        model = getattr(self, component)
        function = getattr(model, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            return self.measure(f"{component}.{method}", lambda: function(*args, **kwargs))

        setattr(model, method, measured)

    def cells(self, resolution: int, device: torch.device) -> Tensor:
        return F.pad(cells_near_surface(self.mesh, resolution, device=device), (1, 0))

    def _image_tokens(self, *args: Any) -> tuple[Tensor, Tensor]:
        encode = super()._image_tokens
        return self.measure("image tokens", lambda: encode(*args))

    def _denoise(self, stage: str, *args: Any, **kwargs: Any) -> Tensor:
        return self.measure(
            f"{stage}: denoising", lambda: super(StagedPipeline, self)._denoise(stage, *args, **kwargs)
        )

    def decode_dense_latents(self, latents: Tensor) -> Tensor:
        decode = super().decode_dense_latents
        self.measure("dense: decoding", lambda: decode(latents))
        coords = self.cells(self.resolutions[0], latents.device)
        print(f"{len(coords)} cells of the mesh at {self.resolutions[0]}^3")
        return coords

    def find_cells(self, latents: Tensor, coords: Tensor, *args: Any) -> Tensor:
        self._decode(self.sparse_stages[0], latents, coords, 1, 0.0)
        cells = self.measure("sparse_1024: cells", lambda: self.cells(self.resolutions[1], coords.device))
        print(f"{len(cells)} cells of the mesh at {self.resolutions[1]}^3")
        return cells

    def _decode(self, stage: Any, latents: Tensor, coords: Tensor, batch_size: int, level: float | None) -> list:
        decoded = super()._decode(stage, latents, coords, batch_size, None)
        sdf = mesh_to_sparse_sdf(self.mesh, stage.resolution, normalize=False, device=str(coords.device))
        real = SparseTensor(sdf.feats.to(coords.device), sdf.coords.to(coords.device))
        mesh = self.measure(
            f"{stage.name}: SDF to mesh", lambda: sparse_sdf_to_mesh(real.feats, real.coords, stage.resolution)
        )
        print(f"{len(decoded[0].feats)} decoded samples; {len(mesh.faces)} faces of the mesh")
        return [mesh]


def prepare(work: Path, tiny: bool, variant: str | None) -> Path:
    """The folder of the converted pipeline."""
    release, converted = work / "release", work / ("converted-" + (variant or "float32"))
    if not release.exists():
        command = [sys.executable, CONVERSION / "make_random_release.py", "--output", release]
        subprocess.run([*command, *(["--tiny"] if tiny else [])], check=True)
    if not converted.exists():
        encoder = next(release.glob("dinov2*.pth"))
        command = [sys.executable, CONVERSION / "convert_direct3d_s2.py", "--original", release]
        command += ["--output", converted, "--image_encoder", encoder, *(["--variant", variant] if variant else [])]
        subprocess.run(command, check=True)
    return converted


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights, about 20 GB")
    parser.add_argument("--mesh", type=Path, required=True, help="whose cells the sparse stages generate in")
    parser.add_argument("--image", default="examples/armchair.png")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--dense_steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--steps_1024", type=int, default=15)
    parser.add_argument("--offload", action="store_true", help="with enable_model_cpu_offload()")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    variant = "fp16" if args.dtype == "float16" else None
    folder = prepare(args.work, args.tiny, variant)
    start = time.perf_counter()
    pipeline = StagedPipeline.from_pretrained(folder, variant=variant, torch_dtype=getattr(torch, args.dtype))
    pipeline.rows, pipeline.mesh = [], normalize_mesh(load_mesh(args.mesh))[0]
    if args.offload:
        pipeline.enable_model_cpu_offload(device=args.device)
    else:
        pipeline.to(args.device)
    loading = time.perf_counter() - start
    for component, method in (("vae", "decode"), ("refiner", "refine")):
        pipeline.measure_method(component, method)
        pipeline.measure_method(f"{component}_1024", method)
    pipeline.set_progress_bar_config(disable=True)
    print(f"{'step':32} {'seconds':>9} {'peak GiB':>8}")
    start = time.perf_counter()
    pipeline(
        args.image,
        generator=torch.Generator(args.device).manual_seed(0),
        dense_num_inference_steps=args.dense_steps,
        num_inference_steps=args.steps,
        num_inference_steps_1024=args.steps_1024,
    )
    total = time.perf_counter() - start
    print(f"{'loading':32} {loading:9.3f}\n{'all, distances of the mesh too':32} {total:9.3f}")
    report = describe_run(args) | {"loading": loading, "total": total, "steps": pipeline.rows}
    write_report(args.json, report)
    return report


if __name__ == "__main__":
    main(parse_args())
