"""The page docs/training_configuration.md: every key of the training configurations, from the dataclasses themselves.

python -m diffusers_sparse3d.training.configuration_reference > docs/training_configuration.md
"""

import dataclasses
import inspect
import json
import re
import typing
from typing import Any

from .configuration import TrainingConfig, VAETrainingConfig, type_name
from .dense_vae import DenseVAEConfig
from .dit_configuration import DiTConfig
from .refiner import RefinerConfig
from .sparse_vae import SparseVAEConfig


SECTIONS: list[tuple[str, str, type[TrainingConfig]]] = [
    ("All commands", "`train dense-vae`, `train sparse-vae`, `train dit` and `train refiner`.", TrainingConfig),
    ("Both VAEs", "`train dense-vae` and `train sparse-vae`.", VAETrainingConfig),
    ("Dense VAE", "`train dense-vae`, `training/train_dense_vae.py`.", DenseVAEConfig),
    ("Sparse VAE", "`train sparse-vae`, `training/train_sparse_vae.py`.", SparseVAEConfig),
    ("Transformers", "`train dit`, `training/train_dit.py`.", DiTConfig),
    ("Refiners", "`train refiner`, `training/train_refiner.py`.", RefinerConfig),
]
INTRODUCTION = """# Configuration of training

The keys of the YAML files that the training commands read, one table for each dataclass. A VAE also has the keys of
the first two tables, a transformer and a refiner those of the first. Any key can be replaced on the command line:
`--override learning_rate=1e-4 model.num_layers=4`. The configurations of the small model are in
`training/configs/small/`; an installed package has them too, by name:
`diffusers-sparse3d train dit --config small/dit_dense`.

This page is written by `python -m diffusers_sparse3d.training.configuration_reference`, and a test compares the two.
"""


def describe_fields(config_class: type) -> dict[str, str]:
    """The meaning of each field that a dataclass documents, from the section "Attributes" of its docstring."""
    section = (inspect.getdoc(config_class) or "").partition("Attributes:\n")[2]
    meanings = {}
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
        meanings[name] = " ".join(text.split())
    return meanings


def describe_default(field: dataclasses.Field[Any]) -> str:
    """The default of a field as it is written in YAML; "required" if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(field.default)}`"


def configuration_page() -> str:
    """The page in Markdown."""
    lines = [INTRODUCTION]
    for title, commands, config_class in SECTIONS:
        lines += [f"## {title}", "", commands, "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        meanings, annotations = describe_fields(config_class), typing.get_type_hints(config_class)
        (base,) = config_class.__bases__
        inherited = {field.name for field in dataclasses.fields(base)} if base is not object else set()
        for field in dataclasses.fields(config_class):
            if field.name not in inherited:
                cells = (type_name(annotations[field.name]).replace("typing.", ""), describe_default(field))
                row = " | ".join(cell.replace("|", "\\|") for cell in (*cells, meanings[field.name]))
                lines.append(f"| `{field.name}` | {row} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(configuration_page(), end="")
