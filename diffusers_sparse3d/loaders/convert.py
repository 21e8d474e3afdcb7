"""Converts a published Direct3D-S2 checkpoint to a diffusers folder.

    python conversion/convert_direct3d_s2.py --original DIR --output DIR [--variant fp16] [--image_encoder ENCODER]

`--original` has `config.yaml` and the `.ckpt` files it speaks of. The result is what
`DiffusionPipeline.from_pretrained` loads; docs/conversion.md says more.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from .. import DenseDiT, DenseVAE, SDFRefiner, SDFSignRefiner, SparseDiT, SparseVAE
from ..command_parser import CommandParser
from ..files import folder_beside
from .original_checkpoint import convert_parameters, load_checkpoint, model_state_dict
from .original_config import (
    IMAGE_ENCODER_ENTRIES,
    MODEL_ENTRIES,
    MODEL_TARGETS,
    SCHEDULER_ENTRIES,
    entry_params,
    model_config,
    target_class,
)
from .original_names import convert_state_dict


MODEL_CLASSES: dict[str, type[ModelMixin]] = {
    model_class.__name__: model_class
    for model_class in (DenseDiT, DenseVAE, SDFRefiner, SDFSignRefiner, SparseDiT, SparseVAE)
}
MAX_SHARD_SIZE = "5GB"
VARIANTS = {"fp16": torch.float16}
BLOCK_NUMEL = 2**28
# The published code extracts meshes at this iso-level.
PUBLISHED_LEVEL = 0.2
# `version` of the published image encoder -> the same weights on the Hub, in transformers' layout.
IMAGE_ENCODERS = {
    "dinov2_vits14_reg": "facebook/dinov2-with-registers-small",
    "dinov2_vitb14_reg": "facebook/dinov2-with-registers-base",
    "dinov2_vitl14_reg": "facebook/dinov2-with-registers-large",
}


def read_config(path: Path) -> dict[str, Any]:
    """Reads the entries of `config.yaml`.

    Raises:
        ValueError: if the file is not there, is not YAML, or has no entries or unknown ones.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` is not a file: `original` must be a folder with the published config.yaml")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is not YAML: {error}") from error
    if not isinstance(config, dict) or not config:
        raise ValueError(f"`{path}` has no entries")
    unknown = [name for name in config if name not in {*MODEL_ENTRIES, *SCHEDULER_ENTRIES, *IMAGE_ENCODER_ENTRIES}]
    if unknown:
        raise ValueError(f"`{path}` has unknown entries {unknown}")
    return config


def convert_scheduler(entry: Mapping[str, Any], name: str) -> SchedulerMixin:
    """Makes the diffusers scheduler that an entry of `config.yaml` names.

    Raises:
        ValueError: if diffusers has no such scheduler, or it does not take the parameters.
    """
    class_name = target_class(entry, name)
    scheduler_class = getattr(diffusers, class_name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"`{name}` of config.yaml names {class_name}, which is not a scheduler of diffusers")
    try:
        return scheduler_class(**entry_params(entry, name))
    except (TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"`{name}` of config.yaml does not fit: {error}") from error


def to_variant(state_dict: dict[str, torch.Tensor], variant: str | None, source: str) -> dict[str, torch.Tensor]:
    """Casts tensors to the dtype of `variant`; they keep their dtypes if it is None.

    Raises:
        ValueError: if a value is too large for the dtype.
    """
    if variant is None:
        return state_dict
    # Views of large blocks: these go back to the system when they are freed, many small pieces of memory do not.
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in state_dict.items():
        if groups[-1] and size + tensor.numel() > BLOCK_NUMEL:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.numel()

    cast, overflow = {}, []
    for names in groups:
        sizes = [state_dict[name].numel() for name in names]
        block = torch.empty(sum(sizes), dtype=VARIANTS[variant])
        for name, piece in zip(names, block.split(sizes)):
            tensor = state_dict[name]
            cast[name] = piece.view(tensor.shape).copy_(tensor)
            if piece.isinf().any() and not tensor.isinf().any():
                overflow.append(name)
    if overflow:
        raise ValueError(f"`{source}` has values that {variant} cannot hold, in {overflow}")
    return cast


def convert_model(
    config: Mapping[str, Any], entry: str, original: Path, output: Path, variant: str | None
) -> ModelMixin:
    """Converts one model of `config.yaml` and saves it.

    Returns:
        The model on the meta device, without its parameters.

    Raises:
        ValueError: if the entry is unknown, or the file does not fit it.
    """
    component, file = MODEL_ENTRIES[entry]
    source = str(original / file)
    class_name = target_class(config[entry], entry)
    if class_name not in MODEL_TARGETS:
        raise ValueError(f"`{entry}` of config.yaml names {class_name}; known are {sorted(MODEL_TARGETS)}")
    model_name = MODEL_TARGETS[class_name]
    state_dict = model_state_dict(model_name, load_checkpoint(source), source)
    with torch.device("meta"):
        model = MODEL_CLASSES[model_name](**model_config(config, model_name, state_dict, entry=entry))
    state_dict = convert_parameters(model, model_name, state_dict, source)
    # The parameters are views of the file and remain so while they are saved.
    model.load_state_dict(to_variant(state_dict, variant, source), assign=True)
    model.save_pretrained(output / component, variant=variant, max_shard_size=MAX_SHARD_SIZE)
    return model.to("meta")


def image_encoder_config(state_dict: Mapping[str, torch.Tensor]) -> Dinov2WithRegistersConfig:
    """Derives the configuration of torch.hub's DINOv2 with registers from its shapes; heads have 64 channels.

    Raises:
        ValueError: if the shapes are not those of one.
    """
    axes = {"patch_embed.proj.weight": 4, "pos_embed": 3, "register_tokens": 3, "blocks.0.mlp.fc1.weight": 2}
    wrong = [name for name, count in axes.items() if state_dict[name].ndim != count or 0 in state_dict[name].shape]
    if wrong or state_dict["patch_embed.proj.weight"].shape[0] % 64:
        shapes = {name: list(state_dict[name].shape) for name in axes}
        raise ValueError(f"The image encoder must have 64 channels a head and DINOv2's parameters, got {shapes}")
    hidden_size, num_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    blocks = [match[1] for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name))]
    grid_size = round((state_dict["pos_embed"].shape[1] - 1) ** 0.5)
    return Dinov2WithRegistersConfig(
        hidden_size=hidden_size,
        num_hidden_layers=max(map(int, blocks)) + 1,
        num_attention_heads=hidden_size // 64,
        mlp_ratio=state_dict["blocks.0.mlp.fc1.weight"].shape[0] // hidden_size,
        image_size=grid_size * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
        num_register_tokens=state_dict["register_tokens"].shape[1],
    )


def save_hub_image_encoder(path: Path, output: Path, variant: str | None) -> None:
    """Converts torch.hub's state dict of a DINOv2 with registers to the file of a published transformers checkpoint.

    Raises:
        ValueError: if the file is not such a state dict.
    """
    checkpoint = load_checkpoint(path)
    needed = ("patch_embed.proj.weight", "pos_embed", "register_tokens", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if not isinstance(checkpoint.get(name), torch.Tensor)]
    if missing:
        raise ValueError(f"`{path}` is not the state dict of a DINOv2 with registers: it has no {missing}")
    state_dict = convert_state_dict("Dinov2WithRegistersModel", checkpoint)
    image_encoder_config(checkpoint).save_pretrained(output)
    file = "model.safetensors" if variant is None else f"model.{variant}.safetensors"
    save_file(to_variant(state_dict, variant, str(path)), output / file, metadata={"format": "pt"})


def load_image_encoder(source: str | os.PathLike, variant: str | None = None) -> Dinov2WithRegistersModel:
    """Loads a Dinov2WithRegistersModel of transformers and checks that every parameter was in its files.

    Raises:
        ValueError: if there is none at `source`, a local folder or Hub id, or parameters are missing, unexpected or
            wrongly shaped.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type != Dinov2WithRegistersConfig.model_type:
            raise ValueError(f"its model type is {config.model_type}")
        # A pair of the model and a dictionary, which transformers does not declare.
        loaded: Any = Dinov2WithRegistersModel.from_pretrained(
            source, variant=variant, output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"`image_encoder` {source} is not a Dinov2WithRegistersModel: {error}") from error
    model, info = loaded
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise ValueError(f"`image_encoder` {source} does not fit a Dinov2WithRegistersModel: {problems}")
    return model


def convert_image_encoder(
    config: Mapping[str, Any], source: str | None, output: Path, variant: str | None
) -> Dinov2WithRegistersModel | None:
    """Saves the image encoder, if there is one.

    Args:
        config: the whole `config.yaml`, both of whose image encoders must be the same.
        source: Hub id, local folder or torch.hub state dict; the one that `config` names if None.
        output: folder of the pipeline.
        variant: as in [`convert`].

    Returns:
        The image encoder on the meta device, without its parameters; None if `config` has none either.

    Raises:
        ValueError: if the image encoder cannot be found or read.
    """
    entries = [config[name] for name in IMAGE_ENCODER_ENTRIES if name in config]
    if any(entry != entries[0] for entry in entries):
        raise ValueError(f"{IMAGE_ENCODER_ENTRIES} of config.yaml differ; the pipeline has one image encoder for both")
    if source is None and not entries:
        return None
    if source is None:
        version = entry_params(entries[0], IMAGE_ENCODER_ENTRIES[0]).get("version")
        if not isinstance(version, str) or version not in IMAGE_ENCODERS:
            raise ValueError(f"config.yaml names the image encoder {version!r}: say with `image_encoder` where it is")
        source = IMAGE_ENCODERS[version]
    folder = output / "image_encoder"
    if os.path.isfile(source):
        save_hub_image_encoder(Path(source), folder, variant)
        model = load_image_encoder(folder, variant)
    else:
        model = load_image_encoder(source)
        state_dict = to_variant(model.state_dict(), variant, source)
        model.load_state_dict(state_dict, assign=True)
        model.save_pretrained(folder, variant=variant, max_shard_size=MAX_SHARD_SIZE)
    return model.to("meta")


def save_model_index(components: Mapping[str, Any], output: Path) -> None:
    """Writes model_index.json for a folder of components; components that are not given are null in it."""
    # Imported here, as the pipelines are above the loaders.
    from .. import Direct3DS2Pipeline

    parameters = inspect.signature(Direct3DS2Pipeline).parameters
    required = {name: None for name, parameter in parameters.items() if parameter.default is parameter.empty}
    # The pipeline takes its image size from the encoder, so that it must be made with one.
    with torch.device("meta"):
        stand_in = {"image_encoder": Dinov2WithRegistersModel(Dinov2WithRegistersConfig())}
    # Untyped, as diffusers' top level hides the types of its pipelines.
    pipe: Any = Direct3DS2Pipeline(**{**required, **stand_in, **components}, default_level=PUBLISHED_LEVEL)
    if "image_encoder" not in components:
        pipe.register_modules(image_encoder=None)
    pipe.save_config(output)


def convert(
    original: str | os.PathLike,
    output: str | os.PathLike,
    variant: str | None = None,
    image_encoder: str | os.PathLike | None = None,
) -> None:
    """
    Converts a published checkpoint to a folder that `DiffusionPipeline.from_pretrained` loads.

    One model is in memory at a time. `output` appears when it is complete; after an error there is nothing.

    Args:
        original: folder with `config.yaml` and the `.ckpt` files of the models that it names.
        output: folder to make; it must not exist, or be empty.
        variant: "fp16" to save half-precision files with that variant in their names; by default the dtypes stay.
        image_encoder: Hub id or local folder of a `Dinov2WithRegistersModel` of transformers, or a file with
            torch.hub's state dict of one; by default the one that `config.yaml` names, from the Hub.

    Raises:
        ValueError: if a file is missing, truncated or foreign, or does not fit `config.yaml`.
    """
    original, output = Path(original), Path(output)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {list(VARIANTS)}, got {variant!r}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"`output` {output} is there already")
    config = read_config(original / "config.yaml")
    with folder_beside(output) as folder:
        components: dict[str, Any] = {}
        source = None if image_encoder is None else os.fspath(image_encoder)
        for entry, component in SCHEDULER_ENTRIES.items():
            if entry in config:
                components[component] = convert_scheduler(config[entry], entry)
                components[component].save_pretrained(folder / component)
        encoder = convert_image_encoder(config, source, folder, variant)
        if encoder is not None:
            components["image_encoder"] = encoder
        with tqdm([entry for entry in MODEL_ENTRIES if entry in config], unit="model") as progress_bar:
            for entry in progress_bar:
                progress_bar.set_description(entry)
                model = convert_model(config, entry, original, folder, variant)
                width = getattr(model.config, "cross_attention_dim", None)
                if width is not None and encoder is not None and width != encoder.config.hidden_size:
                    raise ValueError(
                        f"`{entry}` takes {width} channels, but the image encoder has {encoder.config.hidden_size}"
                    )
                components[MODEL_ENTRIES[entry].component] = model
        save_model_index(components, folder)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of [`convert`]."""
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True, help="folder with config.yaml and the .ckpt files")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help="save files of this variant; default: dtypes stay")
    parser.add_argument(
        "--image_encoder",
        help="Hub id or local folder of a Dinov2WithRegistersModel, or torch.hub's state dict of one; default: the one"
        " that config.yaml names, from the Hub",
    )
    args = parser.parse_args(arguments)
    try:
        convert(args.original, args.output, args.variant, args.image_encoder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
