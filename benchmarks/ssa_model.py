"""A SparseDiT block and the whole model, timed by `benchmarks/ssa.py`; the sizes that it measures."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_sparse3d import SparseDiT
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from ssa_timer import Timer, make_leaves, pair


@dataclass(frozen=True)
class Sizes:
    """The sizes that are measured.

    Attributes:
        resolution: samples per axis of a mesh's grid; a latent cell has 8.
        cases: tokens and top-k of the attention and its stages.
        model_tokens: tokens of the block and the model.
        heads, kv_heads, dim: query heads, key/value heads and channels of SSA and of dense attention.
        wide_heads: heads of dense attention with the same width in fewer heads.
        settings: edges of compression blocks, selection blocks and windows, and the shift of the windows.
        config: of the model.
        image_tokens: tokens that the model is conditioned on.
    """

    resolution: int = 1024
    cases: tuple[tuple[int, int], ...] = ((4096, 8), (16384, 8), (46000, 8), (131072, 8), (131072, 32))
    model_tokens: tuple[int, ...] = (10000, 46000, 131072)
    heads: int = 32
    kv_heads: int = 2
    dim: int = 32
    wide_heads: int = 16
    settings: tuple[int, int, int, int] = (4, 8, 8, 4)
    # As published; all else is the default.
    config: tuple[tuple[str, int], ...] = (("qk_norm", True),)
    image_tokens: int = 1374


TINY_SIZES = Sizes(
    resolution=128,
    cases=((12, 2), (20, 3)),
    model_tokens=(20,),
    heads=2,
    kv_heads=1,
    dim=16,
    wide_heads=1,
    config=(
        ("qk_norm", True),
        ("num_layers", 2),
        ("num_attention_heads", 2),
        ("attention_head_dim", 16),
        ("num_key_value_heads", 1),
        ("cross_attention_dim", 12),
        ("norm_num_groups", 4),
    ),
    image_tokens=6,
)


@dataclass(frozen=True)
class ModelCase:
    """A SparseDiT and its inputs for one set of tokens, whose attention is planned before it is timed."""

    model: SparseDiT
    coords: Tensor
    context: Tensor
    context_coords: Tensor
    args: argparse.Namespace

    def plan(self) -> tuple[CoordinateCache, CoordinateCache]:
        """New caches of the coordinates of tokens and context, with the plans of all blocks."""
        caches = CoordinateCache(self.coords, 1), CoordinateCache(self.context_coords, 1)
        for block in self.model.transformer_blocks:
            block.plan(self.context, *caches)
        return caches

    def block(self) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """A call of one block, and the tensors that get gradients."""
        block, width = self.model.transformer_blocks[1], self.model.proj_in.out_features
        hidden, temb = make_leaves([(len(self.coords), width), (1, width)], self.args)
        caches = self.plan()
        inputs = (hidden, self.context, temb.detach(), self.coords, self.context_coords, *caches)
        return lambda: block(*inputs), [hidden, *block.parameters()]

    def whole(self) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """A call of the model, and the tensors that get gradients."""
        hidden = make_leaves([(len(self.coords), self.model.config.in_channels)], self.args)[0].detach()
        timestep = torch.full((1,), 500.0, device=self.coords.device)
        inputs = (hidden, self.coords, timestep, self.context, self.context_coords)
        kept = dict(zip(("cache", "encoder_cache"), self.plan()))
        return lambda: self.model(*inputs, check_inputs=False, **kept).sample, list(self.model.parameters())

    def replayed(self, timer: Timer) -> dict[str, float]:
        """The forward pass of the model with `enable_cuda_graphs`; nothing without a GPU."""
        if not timer.cuda:
            return {}
        self.model.enable_cuda_graphs()
        with torch.no_grad():
            forward = timer.milliseconds(self.whole()[0])
        self.model.disable_cuda_graphs()
        return {"forward": forward}


def make_model(sizes: Sizes, args: argparse.Namespace) -> SparseDiT:
    """A randomly initialised SparseDiT in training mode, with gradient checkpointing."""
    torch.manual_seed(0)
    # Initialised on the device: 24 blocks take a while on a CPU.
    with torch.device(args.device):
        model = SparseDiT(**dict(sizes.config)).to(getattr(torch, args.dtype))
    # Freshly initialised gates are zero: the output of the attention would get no gradient.
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.modulation[1].weight, std=0.02)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True, mode=args.compile)
    model.train().enable_gradient_checkpointing()
    return model


def measure_model(tokens: dict[int, CoordinateCache], sizes: Sizes, timer: Timer, args: Any) -> list[dict]:
    """A row for each number of tokens: a block, the model and its planning."""
    model = make_model(sizes, args)
    context = make_leaves([(sizes.image_tokens, model.config.cross_attention_dim)], args)[0].detach()
    context_coords = torch.zeros(sizes.image_tokens, 4, dtype=torch.int32, device=args.device)
    context_coords[:, 1] = torch.arange(sizes.image_tokens, device=args.device)
    rows = []
    print(f"{'tokens':>8}  {'part':>6} {'milliseconds':>21} {'GiB':>13} {'replayed':>17}   forward / backward")
    for count in sizes.model_tokens:
        case = ModelCase(model, tokens[count].coords, context, context_coords, args)
        for part in ("block", "model"):
            if part not in args.parts:
                continue
            run, leaves = case.block() if part == "block" else case.whole()
            row = {"part": part, "tokens": count}
            try:
                row |= timer.both_ways(run, leaves)
                if not args.compile:
                    row["replayed"] = timer.replayed(run, leaves) if part == "block" else case.replayed(timer)
                if part == "model":
                    row["planning"] = timer.milliseconds(case.plan)
            except torch.cuda.OutOfMemoryError:
                pass
            rows.append(row)
            times, memory = pair(row, "forward", "backward"), pair(row, "forward_gib", "with_backward_gib")
            replayed = pair(row.get("replayed", {}), "forward", "backward")
            notes = f"   planning: {row['planning']:.2f}" if "planning" in row else ""
            print(f"{count:8,}  {part:>6} {times:>21} {memory:>13} {replayed:>17}{notes}", flush=True)
    return rows
