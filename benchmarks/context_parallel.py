"""
Time, memory and result of a call of SparseDiT over several GPUs, beside the same on one.

    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --json context_parallel.json

The published model of the stage to 1024^3 with random weights, on the cells of a torus and 700 image tokens a sample.
Milliseconds are the median of the calls; GiB is the peak of a GPU beside the weights and inputs. Every process
computes both, and the first one writes; the memory and the difference are the largest of all processes. The rounding
is the difference that the last bit of the latents makes on one GPU: attention selects blocks by rank, and nearly equal
ones may change places.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from torch import Tensor

from benchmark_meshes import torus_cells
from diffusers_sparse3d import SparseDiT
from result_files import describe_run, parse_arguments, write_report


# Of the stage to 1024^3.
PUBLISHED = {"sample_size": 128, "coord_scale": 0.5}
TINY = {"sample_size": 16, "in_channels": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8}
TINY |= {"cross_attention_dim": 16, "norm_num_groups": 2, "topk": 2}
IMAGE_TOKENS = 700


class Progress:
    """Lines of the first process, each with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - self.start:6.1f} s  {text}", flush=True)


def make_model(args: argparse.Namespace, device: torch.device) -> SparseDiT:
    """The model with random weights, made on the device: those of the first process on all of them."""
    torch.manual_seed(0)
    with device:
        model = SparseDiT(**(TINY if args.tiny else PUBLISHED))
    for parameter in model.parameters():
        # Layers that start at zero are to matter, too.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1 if args.tiny else 0.02)
        dist.broadcast(parameter.data, src=0)
    return model.to(getattr(torch, args.dtype)).eval().requires_grad_(False)


def make_inputs(args: argparse.Namespace, model: SparseDiT, samples: int, tokens: int, device: torch.device) -> dict:
    """The arguments of a call of the model for so many samples of so many tokens."""
    config, dtype = model.config, getattr(torch, args.dtype)
    cells = torus_cells(tokens, config.sample_size)
    coords = torch.cat([F.pad(cells, (1, 0), value=sample) for sample in range(samples)])
    place = torch.arange(IMAGE_TOKENS)
    patches = torch.stack([torch.zeros_like(place), place % 30, place // 30, torch.zeros_like(place)], dim=1)
    patches = torch.cat([patches + torch.tensor([sample, 0, 0, 0]) for sample in range(samples)])
    generator = torch.Generator().manual_seed(1)

    def random(rows: int, channels: int) -> Tensor:
        return torch.randn(rows, channels, generator=generator).to(device, dtype)

    return {
        "hidden_states": random(len(coords), config.in_channels),
        "coords": coords.int().to(device),
        "timestep": torch.full((samples,), 500.0, device=device),
        "encoder_hidden_states": random(len(patches), config.cross_attention_dim),
        "encoder_coords": patches.int().to(device),
    }


def measure(args: argparse.Namespace, model: SparseDiT, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """The sample of a call, with the median milliseconds and the peak memory beside what is there already."""
    cuda = inputs["coords"].is_cuda
    samples = len(inputs["timestep"])
    caches = model.plan(inputs["coords"], samples, inputs["encoder_coords"])
    options = {"cache": caches[0], "encoder_cache": caches[1], "check_inputs": False}
    sample = model(**inputs, **options).sample
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(args.calls):
        dist.barrier()
        start = time.perf_counter()
        model(**inputs, **options)
        if cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    gib = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return sample, {"milliseconds": statistics.median(times), "gib": gib and largest(gib, sample.device)}


def round_differently(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with every second latent greater by its last bit."""
    latents = inputs["hidden_states"].clone()
    every_second = latents.flatten()[::2]
    every_second.mul_(1 + torch.finfo(latents.dtype).eps)
    return inputs | {"hidden_states": latents}


def distance(sample: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((sample - expected).abs().max() / expected.abs().max())


def largest(value: float, device: torch.device) -> float:
    """The largest of the values of all processes."""
    values = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return float(values)


def case(text: str) -> tuple[int, int]:
    """Samples and the tokens of each, of a text such as "2x43700"."""
    samples, _, tokens = text.partition("x")
    if not (samples.isdigit() and tokens.isdigit() and int(samples) and int(tokens)):
        raise argparse.ArgumentTypeError(f"{text!r} must be samples and tokens, such as 2x43700")
    return int(samples), int(tokens)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [(2, 43_700), (1, 131_072)]
    parser.add_argument("--cases", type=case, nargs="+", default=cases, help="samples x tokens, such as 2x43700")
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, to try the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parse_arguments(parser, __file__, arguments)
    args.command = args.command.replace("python", "torchrun --nproc_per_node 2", 1)
    return args


@torch.no_grad()
def main(args: argparse.Namespace) -> dict[str, Any]:
    if not dist.is_initialized():
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    progress = Progress()
    one = make_model(args, device)
    several = copy.deepcopy(one)
    several.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    progress(f"models with {sum(parameter.numel() for parameter in one.parameters()):,} parameters are made")
    report = describe_run(args) | {"gpus": world, "rows": []}
    for samples, tokens in args.cases:
        inputs = make_inputs(args, one, samples, tokens, device)
        expected, alone = measure(args, one, inputs)
        progress(f"{samples} x {tokens:,}, one: {describe(alone)}")
        found, together = measure(args, several, inputs)
        row = {"samples": samples, "tokens": tokens, "one": alone, "several": together}
        row["difference"] = largest(distance(found, expected), device)
        row["rounding"] = largest(distance(one(**round_differently(inputs)).sample, expected), device)
        differences = f"difference {row['difference']:.1e}, by rounding alone {row['rounding']:.1e}"
        progress(f"{samples} x {tokens:,}, {world}: {describe(together)}, {differences}")
        report["rows"].append(row)
        if rank == 0:
            write_report(args.json, report)
    dist.barrier()
    dist.destroy_process_group()
    return report


def describe(figures: dict[str, Any]) -> str:
    memory = "" if figures["gib"] is None else f" {figures['gib']:.2f} GiB"
    return f"{figures['milliseconds']:.1f} ms{memory}"


if __name__ == "__main__":
    main(parse_args())
