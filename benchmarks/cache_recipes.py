"""
What fewer steps, guidance in a part of the steps and caches over the steps cost and gain, by recipe.

    python benchmarks/cache_recipes.py --json cache_recipes.json
    python benchmarks/cache_recipes.py --work DIR --json cache_recipes_full_size.json

The first form measures the shipped pipeline, which is trained: the meshes of a recipe are compared with those of the
same photo and seed in the exact run (F1 at 0.05, and the Chamfer distance, in model space [-1, 1]^3). Other seeds of
the exact run are compared as well: so much two answers to one photo differ. Seconds on a CPU are those of the
processor. A checkpoint may have few steps by default: `--steps` sets those of the exact run, and shares are of these.

The second form measures the time at the published sizes on a GPU, with the random weights of `full_size.py`. Whether a
step is skipped depends on the weights in the recipes `first block` and `magnitudes`; in all others it does not.
"""

import argparse
import contextlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import trimesh
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

import full_size
from benchmark_meshes import load_or_torus
from diffusers_sparse3d import Direct3DS2Pipeline
from diffusers_sparse3d.geometry.metrics import compare_surfaces
from diffusers_sparse3d.pipelines.stages import argument_name
from result_files import describe_run, parse_arguments, write_report


ROOT = Path(__file__).parents[1]
F1_THRESHOLD = 0.05


@dataclass(frozen=True)
class StageSettings:
    """What a cache must know about the steps of a stage: their number, their guidance, and the ratios of MagCache."""

    pipeline: Direct3DS2Pipeline
    num_steps: int
    guided: bool
    ratios: list[float]


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        steps: share of the exact run's steps.
        sparse_steps: the same for the sparse stages; as `steps` if None.
        interval: the part of the steps with guidance, in stages that have it.
        cache: makes the configuration of a cache; none if None.
    """

    steps: float = 1.0
    sparse_steps: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    cache: Callable[[StageSettings], Any] | None = None


def first_block(threshold: float) -> Callable[[StageSettings], Any]:
    return lambda stage: FirstBlockCacheConfig(threshold)


def magnitudes(threshold: float) -> Callable[[StageSettings], Any]:
    return lambda stage: MagCacheConfig(
        threshold=threshold, num_inference_steps=stage.num_steps, mag_ratios=stage.ratios
    )


def taylor(interval: int, lite: bool = False) -> Callable[[StageSettings], Any]:
    return lambda stage: TaylorSeerCacheConfig(
        cache_interval=interval, use_lite_mode=lite, taylor_factors_dtype=torch.float32
    )


def faster(stage: StageSettings) -> Any:
    return FasterCacheConfig(
        is_guidance_distilled=not stage.guided,
        spatial_attention_timestep_skip_range=(-1, 900),
        unconditional_batch_timestep_skip_range=(-1, 900),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: stage.pipeline.current_timestep,
    )


def pyramid(stage: StageSettings) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 900),
        cross_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: stage.pipeline.current_timestep,
    )


RECIPES = {
    "exact": Recipe(),
    "half the steps": Recipe(steps=0.5),
    # Of 50, 30 and 15 steps 12, 4 and 2.
    "few steps": Recipe(steps=0.25, sparse_steps=0.15),
    "guidance in the first 70 %": Recipe(interval=(0.0, 0.7)),
    "first block": Recipe(cache=first_block(0.1)),
    "magnitudes": Recipe(cache=magnitudes(0.03)),
    "taylor": Recipe(cache=taylor(3)),
    "taylor, lite": Recipe(cache=taylor(3, lite=True)),
    "faster": Recipe(cache=faster),
    "pyramid": Recipe(cache=pyramid),
    "fast": Recipe(steps=0.6, cache=taylor(3, lite=True)),
    "fastest": Recipe(steps=0.5, interval=(0.0, 0.7), cache=taylor(4, lite=True)),
}


@dataclass
class Bench:
    """A pipeline with the numbers that recipes depend on, and the time of its denoising.

    Attributes:
        steps: of the exact run, in the dense stage and in the sparse ones; those of the checkpoint if None.
    """

    pipeline: Direct3DS2Pipeline
    device: str
    steps: tuple[int, int] | None = None
    ratios: dict[str, list[float]] = field(default_factory=dict)
    denoising: float = 0.0

    def __post_init__(self) -> None:
        denoise = self.pipeline.denoise

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            result = denoise(*args, **kwargs)
            self.denoising += self.clock() - start
            return result

        self.pipeline.denoise = timed

    def clock(self) -> float:
        """Seconds of the GPU's work so far, or of this process on a CPU."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def default(self, stage: str, name: str) -> Any:
        """A setting of the checkpoint for a stage."""
        return self.pipeline.config["default_" + argument_name(stage, name)]

    def num_steps(self, stage: str, recipe: Recipe) -> int:
        """The steps of a stage in a recipe."""
        dense = stage == "dense"
        exact = self.default(stage, "num_inference_steps") if self.steps is None else self.steps[0 if dense else 1]
        share = recipe.steps if dense or recipe.sparse_steps is None else recipe.sparse_steps
        return max(1, round(share * exact))

    def generate(self, recipe: Recipe, image: Path, seed: int) -> tuple[trimesh.Trimesh, dict[str, float]]:
        """The mesh of a recipe, with the seconds of the call and of its denoising."""
        settings, transformers = {}, []
        for stage in self.pipeline.stages:
            guided = self.default(stage.name, "guidance_scale") > 1
            steps = self.num_steps(stage.name, recipe)
            settings[argument_name(stage.name, "num_inference_steps")] = steps
            settings[argument_name(stage.name, "guidance_interval")] = recipe.interval if guided else (0.0, 1.0)
            if recipe.cache is not None:
                known = StageSettings(self.pipeline, steps, guided, self.ratios.get(stage.name, []))
                stage.transformer.enable_cache(recipe.cache(known))
                transformers.append(stage.transformer)
        apart = getattr(self.pipeline, "seconds_apart", 0.0)
        self.denoising, start = 0.0, self.clock()
        generator = torch.Generator().manual_seed(seed)
        mesh = self.pipeline(str(image), generator=generator, **settings).meshes[0]
        # Distances of a mesh at full size, which no generation computes, do not count.
        seconds = self.clock() - start - (getattr(self.pipeline, "seconds_apart", 0.0) - apart)
        for transformer in transformers:
            transformer.disable_cache()
        return mesh, {"seconds": seconds, "denoising_seconds": self.denoising}

    def calibrate(self, image: Path) -> None:
        """Find the ratios of magnitudes of each stage, which diffusers prints."""
        calibrating = Recipe(cache=lambda stage: MagCacheConfig(num_inference_steps=stage.num_steps, calibrate=True))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.generate(calibrating, image, seed=0)
        lists = [json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("[") and "," in line]
        self.ratios = dict(zip((stage.name for stage in self.pipeline.stages), lists, strict=True))


class StagedPipeline(full_size.StagedPipeline):
    """The pipeline of `full_size.py`, which goes on with a real mesh, without its table."""

    def measure(self, name: str, function: Callable[[], Any]) -> Any:
        """The result of the function."""
        return function()


def compare(mesh: trimesh.Trimesh, exact: trimesh.Trimesh) -> dict[str, float]:
    """F1 and Chamfer distance to the mesh of the exact run."""
    comparison = compare_surfaces(mesh, exact, num_samples=20_000)
    return {"f1": comparison.f1(F1_THRESHOLD), "chamfer": comparison.chamfer_l1()}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/direct3d-s2-small"))
    photos = [ROOT / "examples" / f"{name}.png" for name in ("sofa", "stool")]
    parser.add_argument("--images", type=Path, nargs="+", default=photos)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    names = ("DENSE", "SPARSE")
    parser.add_argument("--steps", type=int, nargs=2, metavar=names, help="of the exact run; those of the checkpoint")
    parser.add_argument("--work", type=Path, help="folder of full_size.py: measure the published sizes")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--refiner_dtype", choices=("float16", "bfloat16", "float32"), help="--dtype by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def load(args: argparse.Namespace) -> Direct3DS2Pipeline:
    """The pipeline to measure."""
    dtype = getattr(torch, args.dtype)
    if args.work is None:
        pipeline = Direct3DS2Pipeline.from_pretrained(args.model, torch_dtype=dtype)
    else:
        variant = None if args.dtype == "float32" else "fp16"
        folder = full_size.prepare(args.work, tiny=False, variant=variant)
        dtypes = {"default": dtype}
        if args.refiner_dtype:
            dtypes |= dict.fromkeys(("refiner", "refiner_1024"), getattr(torch, args.refiner_dtype))
        pipeline = StagedPipeline.from_pretrained(folder, variant=variant, torch_dtype=dtypes)
        first, last = pipeline.resolutions
        pipeline.meshes = {first: load_or_torus(None), last: load_or_torus(None, full_size.TUBE_1024)}
        pipeline.seconds_apart = 0.0
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)


def main(args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(load(args), args.device, args.steps)
    # Kernels are compiled, graphs are captured, and memory is taken.
    bench.calibrate(args.images[0])
    if args.work is not None:
        bench.generate(RECIPES["exact"], args.images[0], args.seeds[0])
    compares = args.work is None
    exact: dict[tuple[Path, int], trimesh.Trimesh] = {}
    report = describe_run(args) | {"f1_threshold": F1_THRESHOLD, "rows": []}
    print(f"{'recipe':30} {'seconds':>8} {'denoising':>9} {'F1':>6} {'Chamfer':>8}")
    for name in ["exact", *(name for name in args.recipes if name != "exact")]:
        runs = []
        for image in args.images:
            for seed in args.seeds:
                mesh, run = bench.generate(RECIPES[name], image, seed)
                if name == "exact":
                    exact[image, seed] = mesh
                elif compares:
                    run |= compare(mesh, exact[image, seed])
                runs.append({"image": image.stem, "seed": seed, **run})
        row = {"recipe": name, "runs": runs}
        row |= {key: mean(run[key] for run in runs) for key in runs[0] if key not in ("image", "seed")}
        report["rows"].append(row)
        print_row(row)
        write_report(args.json, report)
    if compares and len(args.seeds) > 1:
        report["other_seed"] = compare_seeds(exact, args.images, args.seeds)
        print_row({"recipe": "exact, other seed", **report["other_seed"]})
        write_report(args.json, report)
    return report


def compare_seeds(
    exact: dict[tuple[Path, int], trimesh.Trimesh], images: list[Path], seeds: list[int]
) -> dict[str, float]:
    """What the mesh of another seed differs by from that of the first, the mean over photos and seeds."""
    first, *others = seeds
    pairs = [compare(exact[image, seed], exact[image, first]) for image in images for seed in others]
    return {key: mean(pair[key] for pair in pairs) for key in pairs[0]}


def format_cells(row: dict[str, Any], formats: dict[str, tuple[int, int]]) -> str:
    """The numbers of a row, each with its width and its digits behind the point; a dash where there is none."""
    return " ".join(
        f"{row[key]:{width}.{digits}f}" if key in row else f"{'-':>{width}}"
        for key, (width, digits) in formats.items()
    )


def print_row(row: dict[str, Any]) -> None:
    formats = {"seconds": (8, 2), "denoising_seconds": (9, 2), "f1": (6, 3), "chamfer": (8, 4)}
    print(f"{row['recipe']:30}", format_cells(row, formats), flush=True)


if __name__ == "__main__":
    main(parse_args())
