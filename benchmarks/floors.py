"""The least time that a GPU needs for the matrix products, convolutions and attention of models, counted as they run.

A module takes at least as long as its operations do at the rate of the matrix unit, its exponentials at that of the
exponential unit, and its inputs, outputs and weights at the bandwidth of the memory. Norms, activations and sums might
be part of a product before or after them, so they count as nothing. Training steps are counted without running them.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_sparse3d import SparseDiT, SparseVAE
from diffusers_sparse3d.models.attention import SparseAttention
from diffusers_sparse3d.models.attention_processors import SSAAttnProcessor, WindowAttnProcessor, get_window_size
from diffusers_sparse3d.models.sparse_layers import SparseConv3d
from diffusers_sparse3d.models.transformer_dense import DenseAttention
from diffusers_sparse3d.sparse_tensor import CoordinateCache


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    Attributes:
        operations: additions and multiplications of half-precision matrix products.
        bytes: read or written.
        exponentials: of base 2.
    """

    operations: float
    bytes: float
    exponentials: float


# The H200's were measured; those of the others are 80 % of the data sheets' products and bytes, and 16 exponentials a
# multiprocessor and clock.
RATES = {
    "NVIDIA H200": Rates(783e12, 4.2e12, 4.2e12),
    "A100 80GB": Rates(250e12, 1.6e12, 2.4e12),
    "RTX 4090": Rates(132e12, 0.8e12, 5.1e12),
}


class Work(NamedTuple):
    """What a call of a module computes and moves."""

    operations: float
    bytes: float = 0.0
    exponentials: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """The least time for it."""
        return max(
            self.operations / rates.operations,
            self.bytes / rates.bytes,
            self.exponentials / rates.exponentials,
        )


class FloorCounter:
    """Adds up the least times of all calls inside a `counting` block.

    Attributes:
        operations: of all calls so far.
    """

    def __init__(self) -> None:
        self.operations = 0.0
        self._seconds = dict.fromkeys(RATES, 0.0)

    @contextmanager
    def counting(self, *models: nn.Module) -> Iterator[None]:
        """Count the calls of the modules of these models inside the `with` block."""
        parts = [part for model in models for part in model.modules() if isinstance(part, tuple(_COUNTED))]
        handles = [part.register_forward_hook(self._add, with_kwargs=True) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[str, float]:
        """Seconds by GPU since the last call of this method."""
        taken, self._seconds = self._seconds, dict.fromkeys(RATES, 0.0)
        return taken

    def _add(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        count = next(count for kind, count in _COUNTED.items() if isinstance(part, kind))
        work = count(part, args, kwargs, output)
        self.operations += work.operations
        for gpu, rates in RATES.items():
            self._seconds[gpu] += work.seconds(rates)


def _num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _linear(part: nn.Linear, args: tuple[Tensor], _: Any, output: Tensor) -> Work:
    return Work(2 * output.numel() * part.in_features, _num_bytes(args[0], output, part.weight))


def _convolution(part: nn.Conv3d, args: tuple[Tensor], _: Any, output: Tensor) -> Work:
    operations = 2 * output.numel() * part.weight[0].numel()
    return Work(operations, _num_bytes(args[0], output, part.weight))


def _sparse_convolution(part: SparseConv3d, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Work:
    feats, cache = args
    pairs = len(feats)
    if part.weight.ndim == 3:
        neighbours = cache.neighbour_map()
        counts = (neighbours < neighbours.shape[1]).sum(1)
        if kwargs.get("subdivide"):
            # Of the children of two voxels, 64 pairs are neighbours if it is one voxel, 16 across a face, 4, 1.
            steps = torch.cartesian_prod(*[torch.tensor([1, 0, 1])] * 3).sum(1)
            counts = counts * 4 ** (3 - steps.to(counts.device))
        pairs = int(counts.sum())
    return Work(2 * pairs * part.weight.shape[-2] * part.weight.shape[-1], _num_bytes(feats, output, part.weight))


def _attention(scores: float, heads: int, channels: int) -> Work:
    """Attention of so many pairs of a query and a key."""
    return Work(4 * scores * heads * channels, exponentials=scores * heads)


def _dense_attention(part: DenseAttention, args: tuple[Tensor, ...], kwargs: dict[str, Any], _: Any) -> Work:
    tokens = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else args[0])
    batch_size, queries = args[0].shape[:2]
    return _attention(batch_size * queries * tokens.shape[1], part.heads, part.to_q.out_features // part.heads)


def _sparse_attention(part: SparseAttention, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Work:
    cache: CoordinateCache = kwargs["cache"]
    tokens = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
    queries = cache.seqlens.double()
    if tokens is None:
        scores = _scores_of_self_attention(part, cache, queries)
    elif tokens.ndim == 3:
        scores = float(queries.sum()) * tokens.shape[1]
    else:
        scores = float(queries @ kwargs["encoder_cache"].seqlens[: len(queries)].double())
    return _attention(scores, part.heads, part.dim_head)


def _scores_of_self_attention(part: SparseAttention, cache: CoordinateCache, queries: Tensor) -> float:
    """Pairs of a query and a key. Which blocks SSA chooses is not known: they count with the mean size of a block."""
    processor: Any = part.processor
    if not isinstance(processor, (SSAAttnProcessor, WindowAttnProcessor)):
        return float(queries.square().sum())
    windows = cache.partition(get_window_size(processor, part), part.window_shift)
    scores = float(windows.cu_seqlens.diff().double().square().sum())
    if isinstance(processor, SSAAttnProcessor):
        ssa: Any = part.ssa
        compressed, _ = cache.downsample(ssa.compression_block_size)
        scores += float(queries @ compressed.seqlens.double())
        blocks = cache.partition(ssa.selection_block_size)
        scores += float(queries.sum()) * ssa.topk * float(blocks.cu_seqlens.diff().double().mean())
    return scores


_COUNTED: dict[type[nn.Module], Any] = {
    nn.Linear: _linear,
    nn.Conv3d: _convolution,
    SparseConv3d: _sparse_convolution,
    DenseAttention: _dense_attention,
    SparseAttention: _sparse_attention,
}


class StepWork(NamedTuple):
    """Operations of a model's forward pass, and those of its blocks, which gradient checkpointing calls again."""

    forward: float
    blocks: float

    def step(self, checkpointing: bool) -> float:
        """Operations of a training step: forward, backward with twice as many, and the blocks again."""
        return 3 * self.forward + (self.blocks if checkpointing else 0.0)


def dit_work(model: SparseDiT, cache: CoordinateCache, image_tokens: int) -> StepWork:
    """The work of a SparseDiT on voxels, counted without running it; the model may be on the device "meta".

    Args:
        model: without sparse conditioning.
        cache: of the voxels.
        image_tokens: of each sample.
    """
    context = torch.empty(cache.batch_size, image_tokens, model.config.cross_attention_dim, device="meta")

    def rows(name: str) -> int:
        if "time_embedding" in name or "modulation" in name:
            return cache.batch_size
        return cache.batch_size * image_tokens if name.endswith(("attn2.to_k", "attn2.to_v")) else len(cache.coords)

    def caches(name: str) -> CoordinateCache:
        pooled = ".compress_" in name and not name.endswith("conv_in")
        return cache.downsample(model.config.compression_block_size)[0] if pooled else cache

    return _count_parts(model, rows, caches, context)


def vae_work(model: SparseVAE, cells: CoordinateCache, voxels: CoordinateCache) -> StepWork:
    """The work of a SparseVAE, encoder and decoder, counted without running it; it may be on the device "meta".

    Args:
        model: any.
        cells: those of the latents.
        voxels: the input of the encoder.
    """
    pooled, split = [voxels.downsample(2)[0]], [cells]
    for _ in range(2):
        pooled.append(pooled[-1].downsample(2)[0])
        split.append(split[-1].subdivide())

    def rows(name: str) -> int:
        whole = {"encoder.conv_in": len(voxels.coords), "decoder.conv_out": 8 * len(split[-1].coords)}
        return whole.get(name, len(cells.coords))

    def caches(name: str) -> CoordinateCache:
        kind, _, level = name.partition("_blocks.")
        levels = {"encoder.down": pooled, "decoder.up": split}.get(kind)
        return levels[int(level[0])] if levels else cells

    return _count_parts(model, rows, caches)


def _count_parts(
    model: nn.Module,
    rows: Callable[[str], int],
    caches: Callable[[str], CoordinateCache],
    context: Tensor | None = None,
) -> StepWork:
    """The work of a model's parts by their names: rows of linear layers, voxels of the others, image tokens."""
    counts: dict[str, float] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            counts[name] = 2.0 * rows(name) * part.weight.numel()
        elif isinstance(part, SparseConv3d):
            cache, subdivide = caches(name), ".up_blocks." in name and name.endswith("conv2")
            feats = torch.empty(len(cache.coords), 0, device="meta")
            counts[name] = _sparse_convolution(part, (feats, cache), {"subdivide": subdivide}, feats).operations
        elif isinstance(part, SparseAttention):
            tokens = {"encoder_hidden_states": context} if part.is_cross_attention else {}
            counts[name] = _sparse_attention(part, (), {"cache": caches(name), **tokens}, None).operations
    return StepWork(sum(counts.values()), sum(count for name, count in counts.items() if "_blocks." in name))
