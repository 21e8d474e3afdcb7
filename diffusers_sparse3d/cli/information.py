"""The commands `info` and `tune`: what is installed and what a model is, and faster attention on this GPU."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..version import __version__
from .models import check_device, resolve_model


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "trimesh", "triton", "embreex", "libigl", "gradio")
TRANSFORMERS = ("transformer", "transformer_1024")


@dataclass(frozen=True)
class Component:
    """
    A part of a saved pipeline.

    Attributes:
        name: its folder.
        class_name: name of its class.
        parameters: how many numbers its weights have; 0 for parts without weights.
        dtypes: of the weights, as safetensors calls them.
        size: of the files in bytes.
    """

    name: str
    class_name: str
    parameters: int
    dtypes: frozenset[str]
    size: int


def read_components(folder: Path) -> list[Component]:
    """
    The parts of a saved pipeline, from its index and the heads of its files: no weights are loaded.

    Args:
        folder: with `model_index.json`.

    Raises:
        ValueError: if the index or the head of a file cannot be read.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(folder / 'model_index.json')!r} is no JSON: {error}") from error
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]}
    return [_read_component(folder / name, value[1]) for name, value in parts.items()]


def _read_component(folder: Path, class_name: str) -> Component:
    from safetensors import SafetensorError, safe_open

    parameters, size, dtypes = 0, 0, set()
    # Files with one more dot are variants ("model.fp16.safetensors"): other dtypes of the same weights.
    for path in sorted(path for path in folder.glob("*.safetensors") if path.name.count(".") == 1):
        size += path.stat().st_size
        try:
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                    tensor, count = tensors.get_slice(name), 1
                    for length in tensor.get_shape():
                        count *= length
                    parameters += count
                    dtypes.add(tensor.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}") from error
    return Component(folder.name, class_name, parameters, frozenset(dtypes), size)


def resolutions(folder: Path) -> list[int]:
    """Samples per axis that the stages of a saved pipeline generate, the coarsest first."""
    from ..models.autoencoder_sparse import COMPRESSION_RATIO

    configs = (folder / name / "config.json" for name in TRANSFORMERS)
    sizes = (json.loads(path.read_text(encoding="utf-8"))["sample_size"] for path in configs if path.is_file())
    return [size * COMPRESSION_RATIO for size in sizes]


def info(args: argparse.Namespace) -> None:
    """Prints the installed versions and the device; of a model its parts, sizes, licence, memory and settings."""
    import torch

    _print_row("python", platform.python_version())
    _print_row("diffusers_sparse3d", __version__)
    for package in PACKAGES:
        try:
            _print_row(package, version(package))
        except PackageNotFoundError:
            _print_row(package, "not installed")
    device = check_device(None)
    _print_row("device", torch.cuda.get_device_name() if device == "cuda" else device)
    folder = _local_folder(resolve_model(args.model))
    components = read_components(folder)
    settings = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    print()
    _print_row("model", str(folder))
    _print_row("licence of the weights", settings.get("weights_license") or card_licence(folder) or "not stated")
    _print_row("resolution", " or ".join(map(str, resolutions(folder))))
    _print_row("size on disk", _megabytes(sum(component.size for component in components)))
    for component in components:
        text = component.class_name
        if component.parameters:
            dtypes = ", ".join(sorted(component.dtypes))
            text += f", {component.parameters:,} parameters, {dtypes}, {_megabytes(component.size)}"
        _print_row(component.name, text)
    _print_memory(components)
    for name, value in settings.items():
        if name.startswith("default_") or name == "occupancy_threshold":
            _print_row(name, value)


def _print_memory(components: list[Component]) -> None:
    """Memory that the weights need; what the activations need on top depends on the object."""
    total = sum(component.parameters for component in components)
    largest = max((component.parameters for component in components), default=0)
    _print_row("memory of the weights", f"float32 {_megabytes(4 * total)}, half precision {_megabytes(2 * total)}")
    offloaded = f"float32 {_megabytes(4 * largest)}, half precision {_megabytes(2 * largest)}"
    _print_row("  with --low-memory, GPU", offloaded)


def card_licence(folder: Path) -> str | None:
    """The licence in the head of a model card, which the Hub reads too."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    head = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    return next((line.partition(":")[2].strip() for line in head if line.startswith("license:")), None)


def _local_folder(model: str) -> Path:
    """The folder of a model, which is downloaded if `model` is a name on the Hub."""
    if Path(model).is_dir():
        return Path(model)
    from diffusers import DiffusionPipeline

    from .. import Direct3DS2Pipeline  # noqa: F401  (registers the pipeline with diffusers)

    return Path(DiffusionPipeline.download(model, use_safetensors=True))


def _megabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _print_row(name: str, value: object) -> None:
    print(f"{name:36}{value}")


def tune(args: argparse.Namespace) -> None:
    """Measures which tile shapes of the attention kernels are fastest on this GPU, for the heads of a model."""
    import torch

    from .. import SparseDiT, tune_spatial_sparse_attention

    config = SparseDiT.load_config(resolve_model(args.model), subfolder="transformer")
    if config["attention_type"] != "ssa":
        raise ValueError(f"`attention_type` of the model must be 'ssa', got {config['attention_type']!r}")
    report = tune_spatial_sparse_attention(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"] or config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        dtype=getattr(torch, args.dtype),
        **{name: config[name] for name in ("compression_block_size", "selection_block_size", "topk", "window_size")},
        budget=args.budget,
    )
    print(report)
