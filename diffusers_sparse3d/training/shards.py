"""Tensors that are sharded over processes (DTensor) and whole ones, treated alike."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


# What wrappers of modules add to the names of parameters.
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process has: all of it if it is not sharded. Memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor gathered from its shards; all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Returns tensors gathered from their shards on the CPU, or nothing in processes that do not keep them."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered


def scatter(tensors: dict[str, Tensor], full: dict[str, Tensor]) -> None:
    """Fills tensors, in the layout that they have, from whole ones that the main process has.

    All processes must call this together, with the same names.

    Raises:
        ValueError: in all processes, if the names or shapes are not the same.
    """
    shapes: Any = share({name: tuple(tensor.shape) for name, tensor in full.items()})
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of this model, its tensors differ in {odd[:4]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            part = local(tensor)
            source = full[name] if name in full else torch.empty(tensor.shape, dtype=part.dtype)
            source = source.to(part.device, part.dtype)
            if isinstance(tensor, DTensor):
                source = distribute_tensor(source, tensor.device_mesh, tensor.placements).to_local()
            elif torch.distributed.is_initialized():
                torch.distributed.broadcast(source, 0)
            part.copy_(source)


def share(value: object) -> object:
    """Returns a value of the main process in all processes."""
    return broadcast_object_list([value])[0]


def same_shape(tensor: Tensor, like: Tensor) -> bool:
    """Returns whether two tensors have one shape and are laid out alike over processes."""
    return tensor.shape == like.shape and isinstance(tensor, DTensor) == isinstance(like, DTensor)


def reshard(modules: Iterable[torch.nn.Module]) -> None:
    """Makes FSDP2 modules forget their gathered parameters, after shards were changed under them."""
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


def clean_name(name: str) -> str:
    """The name of a parameter without what wrappers of modules add to it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
