"""Reader of the published `.ckpt` files: runs no code of theirs, makes no copy, accounts for every parameter."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .original_config import CHECKPOINT_KEYS
from .original_names import convert_state_dict, original_name, rename


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file of `torch.save` that holds tensors, numbers, strings and containers of them alone.

    The tensors are views of the file (memory-mapped), if it is in the format of torch 1.6 and later.

    Raises:
        ValueError: if there is no such file, or it is truncated, foreign, holds other objects, or no dictionary.
    """
    if not os.path.isfile(path):
        raise ValueError(f"`{path}` is not a file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    # torch.load meets a damaged or foreign file with errors of many classes.
    except Exception as error:
        raise ValueError(
            f"`{path}` is truncated, is no PyTorch checkpoint, or holds objects other than tensors: {error}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"`{path}` holds a {type(checkpoint).__name__}, not a dictionary of parameters")
    return checkpoint


def model_state_dict(model_name: str, checkpoint: Mapping[str, Any], source: str = "checkpoint") -> dict[str, Tensor]:
    """Returns the original parameters of a model: those at its key of the checkpoint, or all if there is no such key.

    Raises:
        ValueError: if the checkpoint holds other models, or something that is not a tensor; `source` names it there.
    """
    key = CHECKPOINT_KEYS[model_name]
    state_dict = checkpoint.get(key, checkpoint)
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(f"`{source}` must have parameters of {model_name} at {key!r}, got {state_dict!r:.100}")
    others = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"`{source}` has no parameters of {model_name} at {key!r}, but {sorted(map(str, others))}")
    no_numbers = [name for name, tensor in state_dict.items() if tensor.is_complex() or tensor.is_sparse]
    if no_numbers:
        raise ValueError(f"`{source}` must have dense parameters of real numbers, got others in {no_numbers[:3]}")
    return {str(name): tensor for name, tensor in state_dict.items()}


def convert_parameters(
    model: torch.nn.Module, model_name: str, state_dict: Mapping[str, Tensor], source: str = "checkpoint"
) -> dict[str, Tensor]:
    """Converts original parameters to the layout of `model` and checks that none is missing or left over.

    Args:
        model: gives names and shapes alone; may be on the meta device.
        model_name: a key of the table of names.
        state_dict: the original parameters.
        source: the file, for the message.

    Raises:
        ValueError: if parameters are missing, unexpected or wrongly shaped, with the original names of all of them.
    """
    known, unexpected = {}, []
    for name, tensor in state_dict.items():
        try:
            rename(model_name, name)
        except ValueError:
            unexpected.append(name)
        else:
            known[name] = tensor
    converted = convert_state_dict(model_name, known)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def original(names: list[str]) -> list[str]:
        return list(dict.fromkeys(original_name(model_name, name)[0] for name in names))

    unexpected += original([name for name in converted if name not in expected])
    missing = original([name for name in expected if name not in converted])
    wrong = original(
        [name for name, shape in expected.items() if name in converted and converted[name].shape != shape]
    )
    problems = [("missing", missing), ("unexpected", unexpected)]
    problems.append(("wrongly shaped", [f"{name} {list(state_dict[name].shape)}" for name in wrong]))
    if any(names for _, names in problems):
        listed = "; ".join(f"{len(names)} {problem}: {', '.join(names)}" for problem, names in problems if names)
        raise ValueError(f"`{source}` does not fit the configuration of {model_name}. Parameters {listed}")
    return converted
