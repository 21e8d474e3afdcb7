"""
Times the SparseVAE at the published size, with random weights, on real meshes, and its peak memory.

    python benchmarks/vae.py --mesh MESH ... --json vae.json

For each mesh and resolution: encoding its sparse SDF and decoding the latents (bfloat16), decoding with
`enable_tiling()`, SDF to mesh, and one training step, forward and backward of one shape (float32 weights, bfloat16
autocast), without and with gradient checkpointing; and one layer's attention inside windows of 8^3, forward and
backward in float32, as the model calls it and padded to batches, the plain reference. Marching cubes get the signed
distances of the mesh on all samples that the decoder returns, because those of random weights have no sensible
surface. Medians of `--repeats` calls after one; peaks are the allocator's, with weights, inputs and results.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmark_meshes import load_or_torus, mesh_name
from diffusers_sparse3d import SparseVAE
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks
from diffusers_sparse3d.ops.coordinates import subdivide_coords
from diffusers_sparse3d.ops.packed_attention import partitioned_attention
from diffusers_sparse3d.ops.packed_attention import reference as padded_attention
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from result_files import describe_run, parse_arguments, write_report


STEPS = (
    "encode",
    "decode",
    "decode, tiled",
    "SDF to mesh",
    "window attention",
    "window attention, padded",
    "training step",
    "training step, checkpointing",
)
TINY_CONFIG = {
    "latent_channels": 4,
    "encoder_channels": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_channels": 32,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "norm_num_groups": 2,
}


class Shape:
    """The input of the encoder, and the distances at all samples of its latent cells, in the order of the decoder."""

    def __init__(self, path: str | None, resolution: int, device: str):
        blocks = mesh_to_sdf_blocks(load_or_torus(path), resolution, normalize=False, device=device)
        coords, feats, _ = blocks.band()
        self.feats, self.coords = feats.to(device), F.pad(coords, (1, 0)).to(device)
        self.latent_coords = F.pad(blocks.coords, (1, 0)).to(device)
        child = torch.zeros(1, 4, dtype=torch.int32)
        for _ in range(3):
            child = subdivide_coords(child)
        place = (child[:, 1:] * torch.tensor([64, 8, 1])).sum(dim=1)
        self.target = blocks.values.flatten(1)[:, place].reshape(-1, 1).to(device)


class Measurement:
    """Medians of times and peaks of one device; each measured step becomes a row of the table.

    Args:
        device: what is measured.
        repeats: timed calls of each step, after one that is not.
        keep: called after each step with the rows so far.
    """

    def __init__(self, device: str, repeats: int, keep: Callable[[list[dict[str, Any]]], None]):
        self.cuda, self.repeats = torch.device(device).type == "cuda", repeats
        self.rows: list[dict[str, Any]] = []
        self.keep = keep
        print(f"{'mesh':24} {'R':>5} {'latents':>8} {'step':30} {'seconds':>9} {'peak GiB':>9}")

    def __call__(self, about: dict[str, Any], step: str, function: Callable[[], Any]) -> Any:
        times, result = [], None
        try:
            for _ in range(1 + self.repeats):
                # The result is freed first: two at once would count twice.
                result = None
                if self.cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                result = function()
                if self.cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[1:])
        except torch.cuda.OutOfMemoryError:
            seconds = None
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None
        self.rows.append({**about, "step": step, "seconds": seconds, "peak_gib": peak})
        self.keep(self.rows)
        shown = "no memory" if seconds is None else f"{seconds:9.3f}"
        memory = "-" if peak is None else f"{peak:.2f}"
        line = f"{about['mesh']:24.24} {about['resolution']:5} {about['latents']:8} {step:30} {shown} {memory:>9}"
        print(line, flush=True)
        return result


def training_step(vae: SparseVAE, shape: Shape) -> Tensor:
    """Loss of one shape, after its forward and backward pass."""
    vae.zero_grad(set_to_none=True)
    with torch.autocast(shape.feats.device.type, torch.bfloat16):
        posterior = vae.encode(shape.feats, shape.coords, check_inputs=False).latent_dist
        sample = vae.decode(posterior.sample(), shape.latent_coords, check_inputs=False).sample
        loss = F.mse_loss(sample.float(), shape.target) + 1e-3 * posterior.kl().mean()
    loss.backward()
    return loss.detach()


@torch.no_grad()
def inference(
    measure: Measurement, about: dict[str, Any], config: dict[str, int], shape: Shape, args: argparse.Namespace
) -> None:
    vae = SparseVAE(**config).to(args.device, torch.bfloat16).eval()

    def encode() -> Tensor:
        return vae.encode(shape.feats, shape.coords, check_inputs=False).latent_dist.mode()

    def decode() -> Tensor:
        return vae.decode(latents, shape.latent_coords, check_inputs=False).sample

    latents = measure(about, "encode", encode) if "encode" in args.steps else encode()
    expected = measure(about, "decode", decode) if "decode" in args.steps else None
    if "decode, tiled" in args.steps:
        # Moved off the device, where it would count as memory of the tiled decoder.
        expected = None if expected is None else expected.cpu()
        vae.enable_tiling()
        tiled = measure(about, "decode, tiled", decode)
        if expected is not None and tiled is not None:
            measure.rows[-1]["difference"] = (tiled.cpu().float() - expected.float()).abs().max().item()
            print(f"largest difference of the tiled result: {measure.rows[-1]['difference']:.2g}")


def surface(measure: Measurement, about: dict[str, Any], shape: Shape) -> None:
    coords = shape.latent_coords
    for _ in range(3):
        coords = subdivide_coords(coords)
    mesh = measure(about, "SDF to mesh", lambda: sparse_sdf_to_mesh(shape.target, coords, about["resolution"]))
    measure.rows[-1]["faces"] = None if mesh is None else len(mesh.faces)


def window_attention(
    measure: Measurement, about: dict[str, Any], config: dict[str, int], shape: Shape, args: argparse.Namespace
) -> None:
    """Times of a transformer layer of the encoder, on the cells of the latents."""
    attention = SparseVAE(**config).encoder.transformer_blocks[0].attn1
    windows = CoordinateCache(shape.latent_coords).partition(attention.window_size)
    size = (len(shape.latent_coords), attention.heads, attention.dim_head)
    leaves = [torch.randn(size, device=args.device, requires_grad=True) for _ in range(3)]
    boundaries, orders = (windows.cu_seqlens, windows.cu_seqlens), (windows.order, windows.order)
    functions = {
        "window attention": lambda: partitioned_attention(*leaves, windows, windows),
        "window attention, padded": lambda: padded_attention.packed_attention(*leaves, *boundaries, None, *orders),
    }

    def step(attend: Callable[[], Tensor]) -> list[Tensor]:
        output = attend()
        return [output.detach(), *torch.autograd.grad(output, leaves, leaves[0].detach())]

    expected = None
    for name, attend in functions.items():
        if name in args.steps:
            result = measure(about, name, lambda attend=attend: step(attend))
            measure.rows[-1]["windows"] = len(windows.coords)
            if expected is not None and result is not None:
                differences = [float((one - other).norm() / other.norm()) for one, other in zip(expected, result)]
                measure.rows[-1]["difference"] = max(differences)
                print(f"largest relative difference of output and gradients: {max(differences):.2g}")
            expected = result


def training(
    measure: Measurement, about: dict[str, Any], config: dict[str, int], shape: Shape, args: argparse.Namespace
) -> None:
    vae = SparseVAE(**config).to(args.device).train()
    for step in ("training step", "training step, checkpointing"):
        if step in args.steps:
            if step == "training step, checkpointing":
                vae.enable_gradient_checkpointing()
            loss = measure(about, step, lambda: training_step(vae, shape))
            measure.rows[-1]["loss"] = None if loss is None else float(loss)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="+", default=[None], help="files; a torus if none is given")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a narrow model at 64^3, to try the script")
    args = parse_arguments(parser, __file__, arguments)
    if args.tiny:
        args.resolutions, args.repeats = [64], 1
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    # The published configuration is the default.
    config = TINY_CONFIG if args.tiny else {}
    report = describe_run(args)

    def keep(rows: list[dict[str, Any]]) -> None:
        report["rows"] = rows
        write_report(args.json, report)

    measure = Measurement(args.device, args.repeats, keep)
    for path in args.mesh:
        for resolution in args.resolutions:
            shape = Shape(path, resolution, args.device)
            about = {
                "mesh": mesh_name(path),
                "resolution": resolution,
                "latents": len(shape.latent_coords),
                "input_samples": len(shape.feats),
                "decoded_samples": len(shape.target),
            }
            inference(measure, about, config, shape, args)
            if "SDF to mesh" in args.steps:
                surface(measure, about, shape)
            if any(step.startswith("window attention") for step in args.steps):
                window_attention(measure, about, config, shape, args)
            training(measure, about, config, shape, args)
    # What was added to rows after their step.
    keep(measure.rows)
    return report


if __name__ == "__main__":
    main(parse_args())
