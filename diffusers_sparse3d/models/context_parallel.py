"""Context parallelism of packed tokens (Ulysses): each process holds a part of the rows, and attends with some heads.

Layers that treat each row by itself compute the rows of their process. For self-attention the processes exchange rows
for heads: each gets all rows of its share of the query and key/value heads, and returns the rows of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from torch import Tensor

from ..ops.coordinates import encode_coords
from ..sparse_tensor import CoordinateCache


@dataclass(frozen=True)
class RowShard:
    """The rows of this process, in the order of all rows: first those of the first process, and so on.

    Attributes:
        cache: of all rows.
        local: of the rows of this process.
        counts: rows of each process.
        rank: the number of this process in the group.
        group: the processes that share the rows.
    """

    cache: CoordinateCache
    local: CoordinateCache
    counts: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, cache: CoordinateCache, group: dist.ProcessGroup) -> RowShard:
        """Parts that differ by a row at most; `cache` keeps what is derived from the coordinates of this one."""
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        num_rows = cache.coords.shape[0]
        counts = tuple(num_rows // world + (part < num_rows % world) for part in range(world))
        start = sum(counts[:rank])
        coords = cache.coords[start : start + counts[rank]]
        local = cache.derived(("rows of a process", world, rank), lambda: CoordinateCache(coords, cache.batch_size))
        return cls(cache, local, counts, rank, group)

    def take(self, rows: Tensor) -> Tensor:
        """The rows of this process: `[N, ...]` to `[n, ...]`."""
        start = sum(self.counts[: self.rank])
        return rows[start : start + self.counts[self.rank]]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes: `[n, ...]` to `[N, ...]`. Gradients of all processes are added up."""
        world = len(self.counts)
        repeated = rows.expand(world, *rows.shape).flatten(0, 1)
        return _Exchange.apply(repeated, [rows.shape[0]] * world, list(self.counts), self.group)

    def gather_result(self, rows: Tensor) -> Tensor:
        """The same for a result, of which all processes compute the same loss: gradients are not added up."""
        return _GatherResult.apply(rows, self)

    def to_heads(self, rows: Tensor) -> Tensor:
        """Some rows of all heads `[n, H, D]` to all rows of the heads of this process `[N, H / processes, D]`."""
        world = len(self.counts)
        parts = rows.unflatten(1, (world, -1)).movedim(1, 0).flatten(0, 1)
        return _Exchange.apply(parts, [rows.shape[0]] * world, list(self.counts), self.group)

    def to_rows(self, heads: Tensor) -> Tensor:
        """All rows of the heads of this process `[N, H / processes, D]` to its rows of all heads `[n, H, D]`."""
        world, count = len(self.counts), self.counts[self.rank]
        parts = _Exchange.apply(heads, list(self.counts), [count] * world, self.group)
        return parts.unflatten(0, (world, count)).movedim(0, 1).flatten(1, 2)

    def own_heads(self, heads: Tensor) -> Tensor:
        """The heads of this process: `[N, H, D]` to `[N, H / processes, D]`."""
        return heads.chunk(len(self.counts), dim=1)[self.rank]

    def check_same_rows(self) -> None:
        """Raise a ValueError unless all processes have been given the same coordinates, which is only probable to be
        noticed: by their number and the sum of their keys. Waits for all processes."""
        coords = self.cache.coords
        keys = encode_coords(coords)
        place = torch.arange(1, len(keys) + 1, device=keys.device)
        own = torch.stack([place.new_tensor(len(keys)), (keys.long() * place).sum()])
        everyone = [torch.empty_like(own) for _ in self.counts]
        dist.all_gather(everyone, own, group=self.group)
        if any(not torch.equal(other, own) for other in everyone):
            raise ValueError(
                "`coords` must be the same on all processes of a model with context parallelism: generate with the"
                " same picture and the same seed on each of them"
            )


class _Exchange(torch.autograd.Function):
    """Rows `[sum(send), ...]`, of which each process gets a part, for those it sends: `[sum(receive), ...]`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad_outputs[0], ctx.receive, ctx.send, ctx.group), None, None, None


class _GatherResult(torch.autograd.Function):
    """The rows of all processes, whose gradients are the same on all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: RowShard) -> Tensor:
        ctx.shard = shard
        return shard.gather(rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.take(grad_outputs[0]), None


class ContextParallelMixin:
    """`enable_parallelism` for a transformer of packed tokens; a base class before `ModelMixin`."""

    # All that diffusers splits and gathers by hooks, the model does itself: with the rows go their coordinates.
    _cp_plan: dict[str, Any] = {}
    _parallel_config: Any
    transformer_blocks: Any
    device: Any
    is_cache_enabled: Any

    def enable_parallelism(
        self, *, config: ParallelConfig | ContextParallelConfig, cp_plan: dict[str, Any] | None = None
    ) -> None:
        """
        Split the tokens of each call over several processes, of which each is given the same arguments and returns
        the same result.

        Key/value heads are shared out as well, so at most as many processes can take part. The parts of the tokens
        need not be equal: `ulysses_anything` makes no difference. In training, each process has a part of the
        gradient of each weight; add them up over the group, whatever the loss.

        Args:
            config (`ContextParallelConfig` or `ParallelConfig`): With a `ulysses_degree` and no `ring_degree`.
            cp_plan (`dict`, *optional*): Must be empty: the model splits its tokens itself.

        Raises:
            RuntimeError: if `torch.distributed` is not initialized, or parallelism is enabled already.
            ValueError: if `config` or `cp_plan` asks for what packed tokens cannot do.
        """
        if self._parallel_config is not None:
            raise RuntimeError("parallelism is enabled already, and once is all that a model can do")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("`torch.distributed` must be initialized first: call `init_process_group`")
        if isinstance(config, ContextParallelConfig):
            config = ParallelConfig(context_parallel_config=config)
        context = getattr(config, "context_parallel_config", None)
        if context is None or getattr(config, "tensor_parallel_config", None) is not None:
            raise ValueError(
                f"`config` must be a ContextParallelConfig, got {type(config).__name__} without or with more"
            )
        if cp_plan:
            raise ValueError("`cp_plan` must be empty: the model splits its tokens itself")
        self._check_context_parallel(context)
        mesh = context.mesh or dist.device_mesh.init_device_mesh(
            self.device.type, context.mesh_shape, mesh_dim_names=context.mesh_dim_names
        )
        config.setup(dist.get_rank(), dist.get_world_size(), self.device, mesh=mesh)
        self._parallel_config = config

    def _check_context_parallel(self, context: ContextParallelConfig) -> None:
        """Raise a ValueError if `context` is not for this model."""
        if context.ring_degree != 1:
            raise ValueError(
                f"`config.ring_degree` must be 1, got {context.ring_degree}: blocks of keys that queries choose cannot"
                " go round a ring; use `ulysses_degree`"
            )
        degree = context.ulysses_degree
        for block in self.transformer_blocks:
            attn = block.attn1
            if attn.kv_heads % degree or attn.heads % degree:
                raise ValueError(
                    f"`config.ulysses_degree` must divide the {attn.heads} query and {attn.kv_heads} key/value heads"
                    f" of self-attention, got {degree}"
                )
            if not hasattr(attn.processor, "sharded_self_attention"):
                raise ValueError(
                    f"`config` needs attention processors of this package, got {type(attn.processor).__name__}: call"
                    " `set_attn_processor` first"
                )
        if self.is_cache_enabled:
            raise ValueError(
                "`config` cannot be used with a cache over steps, whose decision to skip a block may differ between"
                " processes: call `disable_cache` first"
            )

    def _row_shard(self, cache: CoordinateCache) -> RowShard | None:
        """The rows of this process, if parallelism is enabled."""
        if self._parallel_config is None:
            return None
        return RowShard.of(cache, self._parallel_config.context_parallel_config._ulysses_mesh.get_group())
