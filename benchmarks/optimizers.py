"""
Training steps a second of the small dense transformer with each optimizer, on the same batch.

    python benchmarks/optimizers.py --json benchmarks/results/optimizers.json

The model is that of `training/configs/small/dit_dense.yaml` with its batch size, precision and learning rates; latents
and image tokens are random. The rows are AdamW, this package's Muon, which orthogonalises matrices of one shape
together, and `torch.optim.Muon`, which goes through them one by one, beside AdamW for the other parameters. All start
with the same weights and see the same noise. The loss of each step shows that both Muons train alike. Seconds are the
median of the timed steps; those of the optimizer alone are measured on the last gradients.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from diffusers_sparse3d import DenseDiT
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dit_configuration import DiTConfig
from diffusers_sparse3d.training.optimizers import block_matrices, make_optimizer
from result_files import describe_run, parse_arguments, write_report


CONFIG = Path(__file__).parents[1] / "training/configs/small/dit_dense.yaml"
OPTIMIZERS = ("adamw", "muon", "torch's muon")
# Of 16^2 patches and the class token.
IMAGE_TOKENS = 257
TINY = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "cross_attention_dim": 16,
    "sample_size": 4,
}
WARMUP_STEPS = 3


class TorchMuon:
    """`torch.optim.Muon` for the matrices of blocks and AdamW for the rest, with the settings of a configuration."""

    def __init__(self, config: DiTConfig, model: DenseDiT, fused: bool):
        matrices = block_matrices(model)
        taken = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        decay = config.weight_decay
        rate = config.learning_rate if config.muon_learning_rate is None else config.muon_learning_rate
        self.muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        betas = (config.adam_beta1, config.adam_beta2)
        self.adamw = torch.optim.AdamW(
            others, config.learning_rate, betas, config.adam_epsilon, weight_decay=decay, fused=fused
        )

    def step(self) -> None:
        """Takes a step of both."""
        self.muon.step()
        self.adamw.step()


def seconds(function: Callable[[], Any], device: str) -> float:
    """Seconds until a function has returned and the GPU has done what it asked for."""
    start = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, config: DiTConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one optimizer."""
    torch.manual_seed(0)
    model = DenseDiT(**config.model).to(args.device).train()
    cuda = torch.device(args.device).type == "cuda"
    optimizer = TorchMuon(config, model, cuda) if name == "torch's muon" else make_optimizer(config, model, cuda)
    generator = torch.Generator(args.device).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=args.device, generator=generator)

    size, batch = config.model["sample_size"], args.batch_size
    latents = normal(batch, config.model["in_channels"], size, size, size)
    tokens = normal(batch, IMAGE_TOKENS, config.model["cross_attention_dim"])
    losses: list[torch.Tensor] = []

    def step() -> None:
        noise, sigma = normal(*latents.shape), torch.rand(batch, device=args.device, generator=generator)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            velocity = model(noisy, 1000 * sigma, tokens).sample
        loss = F.mse_loss(velocity.float(), noise - latents)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.detach())

    times = [seconds(step, args.device) for _ in range(WARMUP_STEPS + args.steps)][WARMUP_STEPS:]
    curve = [float(loss) for loss in losses]
    alone = [seconds(optimizer.step, args.device) for _ in range(args.steps)]
    row = {"optimizer": name, "seconds": statistics.median(times), "steps_per_second": 1 / statistics.median(times)}
    return {**row, "optimizer_seconds": statistics.median(alone), "losses": curve}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="that are timed; default: %(default)s")
    parser.add_argument("--batch_size", type=int, help="by default that of the configuration")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parse_arguments(parser, __file__, arguments)


def main(args: argparse.Namespace) -> dict[str, Any]:
    settings = yaml.safe_load(CONFIG.read_text())
    args.batch_size = args.batch_size or settings["batch_size"]
    if args.tiny:
        settings["model"] |= TINY
    configs = {name: build_config(DiTConfig, {**settings, "optimizer": name.split()[-1]}) for name in OPTIMIZERS}
    rows = []
    for name, config in configs.items():
        rows.append(measure(name, config, args))
        row = rows[-1]
        print(
            f"{name:14} {row['steps_per_second']:7.2f} steps/s {1e3 * row['optimizer_seconds']:8.2f} ms of it",
            flush=True,
        )
    write_report(args.json, report := {**describe_run(args), "rows": rows})
    return report


if __name__ == "__main__":
    main(parse_args())
