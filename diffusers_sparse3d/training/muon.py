"""One optimizer for a model: Muon for matrices, AdamW for all other parameters; on whole or on sharded parameters."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .shards import local


# Of the quintic iteration, and the smallest norm that is divided by, as torch.optim.Muon has them.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for matrices and AdamW (arXiv 1711.05101) for other parameters, in one optimizer.

    Muon's updates have the size of AdamW's (arXiv 2502.16982), as `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`. Matrices of one shape are orthogonalised together. Where they are sharded by rows
    over processes (FSDP2), each process orthogonalises its share of the matrices.

    Args:
        matrices: Parameters with two axes, which Muon trains.
        others: Parameters that AdamW trains.
        muon_learning_rate: Learning rate of Muon.
        learning_rate: Learning rate of AdamW.
        weight_decay: Decoupled weight decay of both.
        momentum: Momentum of Muon (Nesterov).
        betas: Decay rates of AdamW's moments.
        eps: Constant in the denominator of AdamW's update.
        fused: Whether AdamW runs as one kernel, for parameters on a GPU.

    Raises:
        ValueError: if there are no matrices, or one of them has not two axes.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        muon_learning_rate: float,
        learning_rate: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool = False,
    ):
        if not matrices or any(parameter.ndim != 2 for parameter in matrices):
            raise ValueError(f"`matrices` must have two axes each, got {[tuple(matrix.shape) for matrix in matrices]}")
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "lr": muon_learning_rate, "muon": True},
            {"params": list(others), "lr": learning_rate, "muon": False},
        ]
        defaults = {"weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps, "fused": fused}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes a step; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                for alike in group_by(parameters, lambda parameter: (parameter.shape, _placement(parameter))):
                    self._muon_step(alike, group)
            else:
                for alike in group_by(parameters, lambda parameter: isinstance(parameter, DTensor)):
                    self._adamw_step(alike, group)
        return loss

    def _muon_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Updates matrices of one shape and layout."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        directions = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        updates = _orthogonalize_shards(directions, parameters[0])
        rows, columns = parameters[0].shape
        rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
        weights = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.to(weights[0].dtype).unbind(0)), alpha=-rate)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Updates parameters that are all whole or all sharded."""
        for parameter in parameters:
            if not self.state[parameter]:
                device = parameter.device if group["fused"] else None
                self.state[parameter].update(
                    step=torch.zeros((), device=device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            foreach=None if group["fused"] else True,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def group_by(values: Sequence[Tensor], key: Callable[[Tensor], Any]) -> list[list[Tensor]]:
    """Returns values in groups of one key, in the order of their first members."""
    groups: dict[Any, list[Tensor]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return list(groups.values())


def orthogonalize(matrices: Tensor) -> Tensor:
    """Returns matrices `[n, rows, columns]` with all singular values moved to about 1 (0.7 to 1.2), bfloat16.

    Newton-Schulz iteration of odd polynomials of degree 5, for all matrices at once.
    """
    a, b, c = COEFFICIENTS
    values = matrices.bfloat16()
    tall = values.shape[1] > values.shape[2]
    values = values.mT.contiguous() if tall else values
    values = values / values.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = values @ values.mT
        values = torch.baddbmm(values, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), values, beta=a)
    return values.mT if tall else values


def _placement(parameter: Tensor) -> Any:
    """What tells layouts of parameters over processes apart."""
    return (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None


def _orthogonalize_shards(parts: Tensor, parameter: Tensor) -> Tensor:
    """Returns the orthogonalised matrices, laid out as they came: whole, or the rows that this process has.

    Args:
        parts: This process's rows of n matrices, `[n, rows of this process, columns]`.
        parameter: One of the parameters, which says how matrices are laid out.
    """
    shards = (
        [axis for axis, place in enumerate(parameter.placements) if isinstance(place, Shard)]
        if isinstance(parameter, DTensor)
        else []
    )
    if not isinstance(parameter, DTensor) or not shards:
        return orthogonalize(parts)
    if len(shards) > 1 or parameter.placements[shards[0]] != Shard(0):
        raise ValueError(f"Muon needs matrices that are whole or sharded by rows, got {parameter.placements}")
    group = parameter.device_mesh.get_group(shards[0])
    size = torch.distributed.get_world_size(group)
    count, own_rows, columns = parts.shape
    # Shards have as many rows as the first, but for the last ones. Padded, all exchange equal blocks: of each matrix
    # its rows go to one process, which gets all rows of its matrices.
    rows, share = -(-parameter.shape[0] // size), -(-count // size)
    padded = F.pad(parts.bfloat16(), (0, 0, 0, rows - own_rows, 0, share * size - count))
    received = _exchange(padded.view(size, share, rows, columns), group)
    full = received.transpose(0, 1).reshape(share, size * rows, columns)[:, : parameter.shape[0]]
    result = F.pad(orthogonalize(full), (0, 0, 0, size * rows - parameter.shape[0]))
    sent_back = _exchange(result.view(share, size, rows, columns).transpose(0, 1), group)
    return sent_back.reshape(size * share, rows, columns)[:count, :own_rows]


def _exchange(blocks: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Sends block i of `[processes, ...]` to process i and returns the blocks that came from each process."""
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    torch.distributed.all_to_all_single(received, blocks, group=group)
    return received
