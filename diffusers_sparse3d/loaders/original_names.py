"""Parameter names of the published Direct3D-S2 checkpoints and of this package: the one table between them.

Each model class has an ordered list of `(pattern, replacement)` rules, regular expressions applied to the whole
original name; the first rule that matches wins. Fused projections (`to_qkv`, `to_kv`) are written with a replacement
per part, separated by `|`, and are split into equal parts along the first axis.
"""

from __future__ import annotations

import re

import torch


RULES: dict[str, list[tuple[str, str]]] = {
    "SparseDiT": [],
    "SparseVAE": [],
    "DenseDiT": [],
    "DenseVAE": [],
}


def rename(model_name: str, name: str) -> list[str]:
    """The names in this package of the original parameter `name`: one, or one per part of a fused projection.

    Raises:
        ValueError: if no rule of `model_name` matches `name`.
    """
    for pattern, replacement in RULES[model_name]:
        match = re.fullmatch(pattern, name)
        if match:
            return [match.expand(part) for part in replacement.split("|")]
    raise ValueError(f"`{name}` is not a parameter of the original {model_name}")


def convert_state_dict(model_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and split an original state dict into the layout of this package's model class.

    Args:
        model_name: class name, a key of `RULES`.
        state_dict: parameters in the original layout; tensors of any dtype, not copied except where fused.

    Returns:
        The state dict that `load_state_dict(strict=True)` of the model class takes.

    Raises:
        ValueError: if a name is unknown; all unknown names are listed.
    """
    unknown, converted = [], {}
    for name, tensor in state_dict.items():
        try:
            targets = rename(model_name, name)
        except ValueError:
            unknown.append(name)
            continue
        parts = tensor.chunk(len(targets), dim=0) if len(targets) > 1 else [tensor]
        converted.update(zip(targets, parts))
    if unknown:
        raise ValueError(f"`state_dict` has names that are not parameters of the original {model_name}: {unknown}")
    return converted
