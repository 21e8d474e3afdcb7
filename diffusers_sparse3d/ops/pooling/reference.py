"""Mean pooling in plain PyTorch: the oracle of the kernels and the path of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_mean_pool_reference(feats: Tensor, parents: Tensor, num_parents: int, exact_mean: bool) -> Tensor:
    """See `ops.pooling.sparse_mean_pool`; `parents` `[N]` int64 is the coarse row of each row."""
    accumulator = torch.promote_types(feats.dtype, torch.float32)
    total = torch.zeros(num_parents, feats.shape[1], dtype=accumulator, device=feats.device)
    total = total.index_add(0, parents, feats.to(accumulator))
    count = torch.zeros(num_parents, dtype=accumulator, device=feats.device)
    count = count.index_add(0, parents, torch.ones_like(parents, dtype=accumulator))
    divisor = count.clamp(min=1) if exact_mean else count + 1
    return (total / divisor[:, None]).to(feats.dtype)
