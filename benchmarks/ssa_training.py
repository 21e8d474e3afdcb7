"""
Trains a small SparseDiT with the kernels of Spatial Sparse Attention, and with the reference in their place.

    python benchmarks/ssa_training.py --json ssa_training.json --plot ssa_training.png

Latents come from a SparseVAE, by default the small one of this repository, of primitive shapes, or of `--mesh`. Each
run has the rectified-flow loss of `training/train_dit.py`, on all shapes in every step, with AdamW and, on a GPU,
bfloat16 autocast. Runs of one seed have the same initial weights, noise and noise levels, so that their losses
differ by rounding alone; that difference is compared with the one between seeds. "end" is the mean of the last
quarter of the steps.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor
from tqdm import tqdm

from diffusers_sparse3d import SparseDiT, SparseVAE
from diffusers_sparse3d.geometry.mesh import load_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from diffusers_sparse3d.ops.spatial_sparse_attention import api
from result_files import describe_run, parse_arguments, write_report


MODEL = {
    "num_layers": 6,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "num_key_value_heads": 2,
    "cross_attention_dim": 256,
    "compression_block_size": 4,
    "selection_block_size": 4,
    "topk": 8,
    "window_size": 8,
    "compression_version": "v1",
}
TINY_MODEL = MODEL | {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_key_value_heads": 1,
    "cross_attention_dim": 8,
}
# Conditioning tokens of a shape, random numbers that tell it from the others.
CONTEXT_TOKENS = 16
PATHS = ("kernels", "reference")


def primitives() -> list[trimesh.Trimesh]:
    """Meshes of six primitive shapes."""
    return [
        trimesh.creation.box((1.0, 0.6, 0.4)),
        trimesh.creation.icosphere(4, 0.7),
        trimesh.creation.torus(0.7, 0.2),
        trimesh.creation.capsule(0.8, 0.3),
        trimesh.creation.cone(0.6, 1.2),
        trimesh.creation.annulus(0.3, 0.8, 0.5),
    ]


@torch.no_grad()
def make_latents(args: argparse.Namespace) -> tuple[Tensor, Tensor, int]:
    """Latents `[N, C]` of zero mean and unit variance, coords `[N, 4]` (shape, x, y, z), and the shapes' number."""
    vae = SparseVAE.from_pretrained(args.vae).to(args.device)
    meshes = primitives() if args.mesh is None else [load_mesh(path) for path in args.mesh]
    latents, coords = [], []
    for number, mesh in enumerate(tqdm(meshes[: args.shapes], desc="latents")):
        sdf = mesh_to_sparse_sdf(mesh, args.resolution, progress=False).to(args.device)
        output = vae.encode(sdf.feats, sdf.coords)
        latents.append(output.latent_dist.mode())
        coords.append(output.coords.clone())
        coords[-1][:, 0] = number
    latents = torch.cat(latents).float()
    return (latents - latents.mean(0)) / latents.std(0), torch.cat(coords), len(coords)


def train(
    latents: Tensor, coords: Tensor, num_shapes: int, seed: int, path: str, args: argparse.Namespace
) -> list[float]:
    """Trains a model by one path, and returns the loss of each step."""
    model_config = TINY_MODEL if args.tiny else MODEL
    torch.manual_seed(seed)
    model = SparseDiT(sample_size=args.resolution // 8, in_channels=latents.shape[1], **model_config)
    model = model.to(args.device).train()
    # Made on the CPU, so that both paths get the same numbers.
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(num_shapes * CONTEXT_TOKENS, model_config["cross_attention_dim"], generator=generator)
    context_coords = torch.zeros(len(context), 4, dtype=torch.int32)
    context_coords[:, 0] = torch.arange(num_shapes).repeat_interleave(CONTEXT_TOKENS)
    context_coords[:, 1] = torch.arange(CONTEXT_TOKENS).repeat(num_shapes)
    context, context_coords = context.to(args.device), context_coords.to(args.device)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    original = api.runs_kernels
    with patch.object(api, "runs_kernels", lambda tensor: path == "kernels" and original(tensor)):
        for _ in tqdm(range(args.steps), desc=f"{path}, seed {seed}"):
            sigma = torch.randn(num_shapes, generator=generator).sigmoid().to(args.device)
            noise = torch.randn(latents.shape, generator=generator).to(args.device)
            rows = sigma[coords[:, 0].long(), None]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                velocity = model(
                    (1 - rows) * latents + rows * noise,
                    coords,
                    1000 * sigma,
                    context,
                    encoder_coords=context_coords,
                    check_inputs=False,
                ).sample
                loss = F.mse_loss(velocity.float(), noise - latents)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def plot(curves: dict[str, dict[int, list[float]]], path: Path) -> None:
    """The loss curves, smoothed over ten steps. Needs the package matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for (name, by_seed), line in zip(curves.items(), ("-", "--")):
        for seed, losses in by_seed.items():
            smooth = torch.tensor(losses).unfold(0, min(10, len(losses)), 1).mean(1)
            axes.plot(smooth, f"C{seed}{line}", label=f"{name}, seed {seed}")
    axes.set(xlabel="step", ylabel="loss, mean of ten steps", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default="checkpoints/direct3d-s2-small/vae", help="folder or name of a SparseVAE")
    parser.add_argument("--mesh", nargs="+", help="files in place of primitive shapes")
    parser.add_argument("--shapes", type=int, default=6, help="at most")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model at 64^3, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="picture to draw, as PNG")
    args = parse_arguments(parser, __file__, arguments)
    if args.tiny:
        args.resolution, args.steps, args.seeds, args.shapes = 64, 3, 2, 2
    return args


def main(args: argparse.Namespace) -> dict[str, Any]:
    latents, coords, num_shapes = make_latents(args)
    print(f"{num_shapes} shapes, {len(latents):,} tokens")
    curves = {
        path: {seed: train(latents, coords, num_shapes, seed, path, args) for seed in range(args.seeds)}
        for path in PATHS
    }
    last = max(1, args.steps // 4)
    ends = {path: [statistics.mean(losses[-last:]) for losses in curves[path].values()] for path in PATHS}
    between_paths = [abs(first - second) for first, second in zip(*ends.values())]
    between_seeds = [abs(a - b) for values in ends.values() for a, b in itertools.combinations(values, 2)]
    for path in PATHS:
        print(f"{path:>10}: end {', '.join(f'{end:.4f}' for end in ends[path])}")
    print(
        f"largest difference of ends: {max(between_paths):.4f} between paths, {max(between_seeds):.4f} between seeds"
    )
    report = {
        **describe_run(args),
        "tokens": len(latents),
        "ends": ends,
        "between_paths": between_paths,
        "between_seeds": between_seeds,
        "losses": curves,
    }
    write_report(args.json, report)
    if args.plot:
        plot(curves, args.plot)
    return report


if __name__ == "__main__":
    main(parse_args())
