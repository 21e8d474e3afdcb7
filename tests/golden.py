"""Golden cases: numbers computed once with the published Direct3D-S2 modules, which our models must reproduce.

`fixtures/make_golden.py` makes the fixtures. `fixtures/golden/<case>.json` holds the configuration (original argument
names) and the parameter names and shapes in the original layout; `fixtures/golden/<case>.safetensors` the inputs and
outputs. Large outputs are kept on a subset of rows, which `rows` lists: `output` and `grad_input` of the SSA cases,
`output` and `output_coords` of `sparse_vae` (whose `output_feats_sample` is every 97th row of the decoder's features).
The inputs of `refiner` and `refiner_sign` follow a formula; their `values` are the refined volume at `positions`.
Parameters are not stored: each is a function of its name and shape.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file


FIXTURES = Path(__file__).parent / "fixtures" / "golden"


class GoldenCase(NamedTuple):
    """`config` in original names, `state_dict` (float32) in the original layout, `tensors` as stored."""

    config: dict
    state_dict: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor]


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of parameter `name`: unit-gain normal for weights, near one for norm scales."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if len(shape) == 1 and leaf in ("weight", "gamma"):
        return 1.0 + 0.1 * normal
    if leaf == "bias" or len(shape) <= 1 or leaf in ("intra_block_pe", "gamma"):
        return 0.1 * normal
    fan_in = int(np.prod(shape[:-1])) if leaf == "kernel" else int(np.prod(shape[1:]))
    return normal / np.sqrt(fan_in, dtype=np.float32)


def load_golden(case: str, with_weights: bool = True) -> GoldenCase:
    """One case by name: ssa_v1, ssa_v2, sparse_dit, dense_dit, sparse_vae, dense_vae, refiner or refiner_sign.

    Without weights the parameters of the state dict have their shapes alone.
    """
    entry = json.loads((FIXTURES / f"{case}.json").read_text())
    scale = entry.get("scale", {})
    state_dict = {
        name: torch.from_numpy(golden_weight(name, tuple(shape))) * scale.get(name, 1.0)
        if with_weights
        else torch.empty(shape, device="meta")
        for name, shape in entry["shapes"].items()
    }
    return GoldenCase(entry["config"], state_dict, load_file(FIXTURES / f"{case}.safetensors"))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
