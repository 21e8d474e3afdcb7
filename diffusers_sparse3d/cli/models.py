"""Which model a command takes, with which LoRA weights and on which device: checked before anything is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import checks


if TYPE_CHECKING:
    from ..pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
DEFAULT_MODEL = "direct3d-s2-small"
WHERE_MODELS_ARE = (
    "a small one comes with a checkout of the repository installed by `pip install -e`; others are on the Hub, or made"
    " by `diffusers-sparse3d convert`"
)


class Lora(NamedTuple):
    """
    LoRA weights to load, and how much of them.

    Attributes:
        source: a safetensors file, a folder with one, or "owner/name" on the Hub.
        weight: factor of what they add.
    """

    source: str
    weight: float


def resolve_model(model: str | None, index: str = "model_index.json") -> str:
    """
    The folder or the Hub's name of a model.

    Args:
        model: a folder with `index`; the name of a folder in the `checkpoints/` of the checkout that this package is
            installed from; or "owner/name" on the Hub. The checkout's small pipeline if None.
        index: the file that the folder of a model holds.

    Raises:
        ValueError: if it is none of these; the message says where models are.
    """
    if model is None:
        path = CHECKPOINTS / DEFAULT_MODEL
        if not (path / index).is_file():
            raise ValueError(f"`--model` is needed, since the default one is not at {path}: {WHERE_MODELS_ARE}")
        return str(path)
    for path in (Path(model), CHECKPOINTS / model):
        if (path / index).is_file():
            return str(path)
    if Path(model).is_dir():
        raise ValueError(f"`--model` must be the folder of a model: {model!r} has no {index}")
    if not _is_hub_name(model):
        raise ValueError(
            f"`--model` {model!r} is neither a folder nor a name on the Hub (owner/name): {WHERE_MODELS_ARE}"
        )
    return model


def _is_hub_name(text: str) -> bool:
    """Whether a text may be "owner/name" on the Hub, rather than a path to what is not there."""
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~")) and not Path(parts[0]).is_dir()


def resolve_loras(texts: Iterable[str]) -> list[Lora]:
    """
    The LoRA weights that are asked for by texts of the form "PATH" or "PATH:WEIGHT".

    Args:
        texts: each a file, a folder or "owner/name" on the Hub, with a number after a colon if less or more of the
            weights is wanted than all. The colon of a Windows drive, with a slash somewhere behind it, is of the path.

    Raises:
        ValueError: if a weight is no finite number, or there is no such file or folder.
        ImportError: without peft, if any are asked for.
    """
    loras = [_parse_lora(text) for text in texts]
    if loras:
        checks.check_packages("`--lora`", "peft")
    for source, _ in loras:
        path = Path(source)
        if path.is_dir() and not any(path.glob("*.safetensors")):
            raise ValueError(f"`--lora` must be a folder with a safetensors file, {source!r} has none")
        if not path.exists() and not _is_hub_name(source):
            raise ValueError(f"`--lora` {source!r} is neither a file nor a folder nor a name on the Hub (owner/name)")
    return loras


def _parse_lora(text: str) -> Lora:
    source, colon, tail = text.rpartition(":")
    if not colon or "/" in tail or "\\" in tail:
        source, tail = text, "1"
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(
            f"`--lora` must have a finite number as the weight after its last colon, got {tail!r} in {text!r}; a path"
            " with a colon in it is given with `:1` behind it"
        )
    if not source:
        raise ValueError(f"`--lora` must be PATH or PATH:WEIGHT, got {text!r}")
    return Lora(source, weight)


def check_device(device: str | None) -> str:
    """
    The name of the device to run on: the one that is asked for, else a GPU where there is one.

    Raises:
        ValueError: if PyTorch does not know or cannot use it.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    checks.check_device("--device", device)
    return device


def load_pipeline(
    model: str, device: str, dtype: str, low_memory: bool = False, loras: Sequence[Lora] = ()
) -> Direct3DS2Pipeline:
    """
    A pipeline on a device.

    Args:
        model: from [`resolve_model`].
        device: from [`check_device`].
        dtype: name of the torch dtype of the weights.
        low_memory: trade time for memory: only the running model is on a GPU, autoencoders and refiners work in tiles,
            and the two predictions of guidance come one after the other.
        loras: from [`resolve_loras`]; added to the weights of the model.

    Raises:
        ValueError: if the model is another pipeline, or LoRA weights do not fit it.
    """
    import torch
    from diffusers import DiffusionPipeline

    from .. import Direct3DS2Pipeline
    from ..models.compatibility import dtype_argument

    options = dtype_argument(getattr(torch, dtype))
    pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True, **options)
    if not isinstance(pipe, Direct3DS2Pipeline):
        raise ValueError(f"`--model` must hold a Direct3DS2Pipeline, {model!r} has a {type(pipe).__name__}")
    if loras:
        add_loras(pipe, loras)
    if low_memory:
        pipe.enable_vae_tiling()
        pipe.enable_vae_slicing()
        pipe.disable_guidance_batching()
    if low_memory and torch.device(device).type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def add_loras(pipe: Direct3DS2Pipeline, loras: Sequence[Lora]) -> None:
    """Adds LoRA weights to those of the pipeline, which is as fast as without them then."""
    names = [f"lora_{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras):
        try:
            with warnings.catch_warnings():
                # Several adapters are what is wanted.
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                pipe.load_lora_weights(lora.source, adapter_name=name)
        except (ValueError, OSError) as error:
            raise ValueError(f"`--lora` {lora.source!r}: {error}") from error
    pipe.set_adapters(names, [lora.weight for lora in loras])
    # Fused, they take no additional time, and leave plain layers, which CUDA graphs and fused kernels are for.
    # Quantised weights would be rounded again.
    if all(getattr(component, "hf_quantizer", None) is None for component in pipe.components.values()):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
