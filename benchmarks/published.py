"""The published configurations that the benchmarks of training steps take their models and batches from.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from diffusers_sparse3d import SparseDiT, SparseVAE


FOLDER = Path(__file__).parents[1] / "training" / "configs" / "published"
# Recipes of SparseDiT for one card, by the GB of its memory.
CARDS = {24: "dit_sparse_1024_24gb.yaml", 16: "dit_sparse_1024_16gb.yaml"}
CONFIGS = {"dit": "dit_sparse_1024.yaml", "vae": "vae_sparse.yaml"}
RECIPES = {f"dit_{size}gb": size for size in CARDS}
MODELS = {"dit": SparseDiT, "vae": SparseVAE}


def read_config(name: str) -> dict[str, Any]:
    """The settings in a file of published configurations."""
    settings: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return settings


def read_published(model: str) -> dict[str, Any]:
    """The settings of the training of "dit", "vae" or a recipe at 1024^3, with the batches of its last phase."""
    values = read_config(CARDS[RECIPES[model]] if model in RECIPES else CONFIGS[model])
    last = values.pop("phases", [{}])[-1]
    return values | {name: last[name] for name in ("batch_size", "max_tokens") if name in last}


@cache
def count_parameters(model: str) -> int:
    """The number of trained parameters of a published model."""
    with torch.device("meta"):
        made = MODELS[model](**read_published(model)["model"])
    return sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
