"""
Seconds, peak memory and results of a pipeline of the published sizes, by where its weights are kept.

    python benchmarks/offloading.py --work DIR --json offloading.json

A pipeline to 512^3 with random weights in 16 bits is made on the device and saved in DIR, unless it is there. Every
row loads it anew and calls it twice; seconds and peak memory are those of the second call. The sparse stage generates
in the cells of a torus, some 10,600. The difference of a row is the largest of its dense latents, occupancy logits,
sparse latents and signed distances from those of the row with all weights on the device, over the largest of these
values. The first row is compared with its own first call. All rows are compared with the same weights and noise in
float32 as well: those that differ from the first by their rounding alone are as far from float32 as it is. A row that
does not run says why.
"""

import argparse
import gc
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from benchmark_meshes import load_or_torus
from diffusers_sparse3d import DenseDiT, DenseVAE, Direct3DS2Pipeline, SparseDiT, SparseVAE
from diffusers_sparse3d.pipelines.stages import Stage
from mesh_pipeline import MeshPipeline
from result_files import describe_run, parse_arguments, write_report


MODELS = ("image_encoder", "dense_transformer", "dense_vae", "transformer", "vae")
# Of DINOv2-L with registers, the image encoder of the published checkpoints.
ENCODER = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
}
TINY = {
    "image_encoder": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    "dense_transformer": {"sample_size": 4, "in_channels": 2, "num_layers": 2, "num_attention_heads": 2},
    "dense_vae": {"latent_channels": 2, "encoder_block_out_channels": (4, 8), "decoder_block_out_channels": (8, 4)},
    "transformer": {"sample_size": 8, "in_channels": 4, "num_layers": 2, "num_attention_heads": 4, "topk": 2},
    "vae": {"latent_channels": 4, "sample_size": 8, "encoder_layers": 1, "decoder_layers": 1},
}
TINY["image_encoder"]["patch_size"] = 14
TINY["dense_transformer"] |= {"attention_head_dim": 12, "cross_attention_dim": 16}
TINY["dense_vae"] |= {"layers_per_block": 1, "mid_layers": 1, "sample_size": 8}
TINY["transformer"] |= {"attention_head_dim": 8, "cross_attention_dim": 16, "norm_num_groups": 2}
TINY["vae"] |= {"encoder_channels": 32, "encoder_heads": 2, "decoder_channels": 64, "decoder_heads": 2}
TINY["vae"] |= {"norm_num_groups": 2}


class RecordingPipeline(MeshPipeline):
    """Keeps what its stages give, on the CPU, to compare them; starts from the same noise in every dtype."""

    records: dict[str, Tensor]
    # What noise is rounded to: PyTorch draws other numbers in another dtype.
    noise_dtype: torch.dtype

    def denoise(self, stage: Stage, noise: Tensor, *args: Any) -> Tensor:
        """The denoised latents of a stage, from noise of the shape of that which is given."""
        own = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0)).to(self.noise_dtype)
        latents = super().denoise(stage, own.to(noise), *args)
        self.records[f"{stage.name}: latents"] = latents.float().cpu()
        return latents

    def record_logits(self) -> None:
        """Keep the occupancy logits of all calls as well."""
        decode = self.dense_vae.decode

        def recorded(*args: Any, **kwargs: Any) -> Any:
            decoded = decode(*args, **kwargs)
            self.records["occupancy logits"] = decoded[0].float().cpu()
            return decoded

        self.dense_vae.decode = recorded


def move(pipeline: RecordingPipeline, args: argparse.Namespace) -> None:
    """All weights on the device."""
    pipeline.to(args.device)


def offload_models(pipeline: RecordingPipeline, args: argparse.Namespace) -> None:
    pipeline.enable_model_cpu_offload(device=args.device)


def offload_layers(pipeline: RecordingPipeline, args: argparse.Namespace) -> None:
    pipeline.enable_sequential_cpu_offload(device=args.device)


def offload_groups(level: str, disk: bool = False, **settings: Any) -> Callable[..., None]:
    """Offloads groups of layers; to the disk, in a folder that `remove_groups` removes."""
    if level == "block":
        settings["num_blocks_per_group"] = 1

    def offload(pipeline: RecordingPipeline, args: argparse.Namespace) -> None:
        folder = {"offload_to_disk_path": args.work / "groups"} if disk else {}
        pipeline.enable_group_offload(torch.device(args.device), offload_type=f"{level}_level", **settings, **folder)

    return offload


def cast_layers(pipeline: RecordingPipeline, args: argparse.Namespace) -> None:
    """Weights of all models but the image encoder, which is not one of diffusers, in 8 bits."""
    for name in MODELS[1:]:
        model = getattr(pipeline, name)
        model.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=getattr(torch, args.dtype))
    pipeline.to(args.device)


def place(pipeline: RecordingPipeline, args: argparse.Namespace) -> None:
    """Nothing: the weights are where they were loaded."""


ROWS: dict[str, Callable[..., None]] = {
    "all on the GPU": move,
    "model": offload_models,
    "sequential": offload_layers,
    "group, block level": offload_groups("block"),
    "group, block level, stream": offload_groups("block", use_stream=True),
    "group, leaf level": offload_groups("leaf"),
    "group, leaf level, stream": offload_groups("leaf", use_stream=True),
    "group, block level, disk": offload_groups("block", disk=True),
    "group, leaf level, disk": offload_groups("leaf", disk=True),
    "group, leaf level, disk, stream": offload_groups("leaf", disk=True, use_stream=True),
    "layerwise casting, float8": cast_layers,
    'device_map="balanced"': place,
}
FIRST, SEQUENTIAL, BALANCED = "all on the GPU", "sequential", 'device_map="balanced"'


def available_rows(device: str) -> list[str]:
    """The rows that a machine can run: streams and single layers need a GPU, the balanced device map needs two."""
    if torch.device(device).type != "cuda":
        return [name for name in ROWS if name not in (SEQUENTIAL, BALANCED) and "stream" not in name]
    return [name for name in ROWS if name != BALANCED or torch.cuda.device_count() > 1]


def prepare(args: argparse.Namespace) -> Path:
    """The folder of the saved pipeline, made if it is not there."""
    folder: Path = args.work / ("offloading-tiny" if args.tiny else "offloading")
    if folder.exists():
        return folder
    torch.manual_seed(0)
    settings = TINY if args.tiny else {"image_encoder": ENCODER}
    classes = {"dense_transformer": DenseDiT, "dense_vae": DenseVAE, "transformer": SparseDiT, "vae": SparseVAE}
    with torch.device(args.device):
        models: dict[str, Any] = {name: make(**settings.get(name, {})) for name, make in classes.items()}
        models["image_encoder"] = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings["image_encoder"]))
    for model in models.values():
        # Layers start at zero where a DiT would do nothing: all of them are to matter.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 if args.tiny else 0.02)
        model.to(getattr(torch, args.dtype)).eval()
    schedulers = {name: FlowMatchEulerDiscreteScheduler(shift=6.0) for name in ("dense_scheduler", "scheduler")}
    # A threshold of 0 leaves cells, whatever random weights say.
    pipeline = Direct3DS2Pipeline(**models, **schedulers, occupancy_threshold=0.0)
    partial = folder.with_name(folder.name + ".partial")
    pipeline.save_pretrained(partial)
    partial.rename(folder)
    return folder


def gpus(device: str) -> Iterator[int]:
    """The numbers of all GPUs; none if the device is not one."""
    return iter(range(torch.cuda.device_count() if torch.device(device).type == "cuda" else 0))


def generate(pipeline: RecordingPipeline, args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the stages of a call give, with its seconds and the peak memory of each GPU."""
    for gpu in gpus(args.device):
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
    pipeline.records = {}
    start = time.perf_counter()
    output = pipeline(
        args.image,
        dense_num_inference_steps=args.dense_steps,
        num_inference_steps=args.steps,
        output_type="sdf",
    )
    for gpu in gpus(args.device):
        torch.cuda.synchronize(gpu)
    seconds = time.perf_counter() - start
    (sdf,) = output.sdfs
    records = {**pipeline.records, "signed distances": sdf.feats.float().cpu()}
    peaks = [torch.cuda.max_memory_allocated(gpu) / 2**30 for gpu in gpus(args.device)]
    return records, {"seconds": seconds, "peak_gib": peaks, "cells": len(pipeline.records["sparse: latents"])}


def differences(records: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each record, over its largest value.

    Raises:
        ValueError: if records are missing, have another shape or are not finite.
    """
    shapes, others = ({name: tuple(one.shape) for name, one in some.items()} for some in (records, expected))
    if shapes != others:
        raise ValueError(f"the stages gave {shapes} instead of {others}")
    found = {
        name: float((one - expected[name]).abs().max() / expected[name].abs().max()) for name, one in records.items()
    }
    if not all(value < float("inf") for value in found.values()):
        raise ValueError(f"results must be finite, the differences are {found}")
    return found


def load(args: argparse.Namespace, folder: Path, row: str, dtype: str) -> RecordingPipeline:
    """The pipeline of a row, which keeps what its stages give."""
    options = {"device_map": "balanced"} if row == BALANCED else {}
    pipeline = RecordingPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.meshes = {pipeline.resolution: load_or_torus(None)}
    pipeline.noise_dtype = getattr(torch, args.dtype)
    ROWS[row](pipeline, args)
    pipeline.record_logits()
    return pipeline


def exact_records(args: argparse.Namespace, folder: Path) -> dict[str, Tensor]:
    """What the stages give in float32, all weights on the device; TF32, which PyTorch allows for cuDNN, is off."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return generate(load(args, folder, FIRST, "float32"), args)[0]
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def measure(
    args: argparse.Namespace, folder: Path, row: str, expected: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, Any]:
    """The figures of a row; the results of the first one are put into `expected`."""
    start = time.perf_counter()
    pipeline = load(args, folder, row, args.dtype)
    figures = {"loading": time.perf_counter() - start}
    records, _ = generate(pipeline, args)
    if row == FIRST:
        expected |= records
    records, second = generate(pipeline, args)
    compared = {"difference": differences(records, expected), "from_float32": differences(records, exact)}
    largest = {name: max(found.values()) for name, found in compared.items()}
    return figures | second | largest | {"by_record": compared}


def free(args: argparse.Namespace) -> None:
    """Let go of the memory of a row, and of its files."""
    shutil.rmtree(args.work / "groups", ignore_errors=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights, about 7 GB")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="by default all that the machine can run")
    parser.add_argument("--image", default="examples/armchair.png")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dense_steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    folder = prepare(args)
    print(f"made in {time.perf_counter() - start:.1f} s", flush=True)
    free(args)
    exact, expected = exact_records(args, folder), dict[str, Tensor]()
    report = describe_run(args) | {"rows": []}
    print(f"{'weights':34} {'loading':>8} {'seconds':>8} {'difference':>10} {'float32':>10} peak GiB of each GPU")
    for row in [FIRST, *(name for name in args.rows or available_rows(args.device) if name != FIRST)]:
        free(args)
        try:
            figures = measure(args, folder, row, expected, exact)
        # Whatever a package of others raises is what a user would see.
        except Exception as error:
            if row == FIRST:
                raise
            traceback.print_exc(limit=-5)
            figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        report["rows"].append({"weights": row, **figures})
        print_row(report["rows"][-1])
        write_report(args.json, report)
    free(args)
    return report


def print_row(row: dict[str, Any]) -> None:
    name = f"{row['weights']:34}"
    if "error" in row:
        print(name, row["error"], flush=True)
        return
    seconds = f"{row['loading']:8.2f} {row['seconds']:8.2f}"
    peaks = " ".join(f"{peak:.2f}" for peak in row["peak_gib"])
    print(name, seconds, f"{row['difference']:10.1e} {row['from_float32']:10.1e} {peaks}", flush=True)


if __name__ == "__main__":
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
    main(parse_args())
