"""Which model a command takes, and on which device: checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .. import checks


if TYPE_CHECKING:
    from ..pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
DEFAULT_MODEL = "direct3d-s2-small"
WHERE_MODELS_ARE = (
    "a small one comes with a checkout of the repository installed by `pip install -e`; others are on the Hub, or made"
    " by `diffusers-sparse3d convert`"
)


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
    parts = model.split("/")
    if len(parts) != 2 or not all(parts) or parts[0].startswith((".", "~")) or Path(parts[0]).is_dir():
        raise ValueError(
            f"`--model` {model!r} is neither a folder nor a name on the Hub (owner/name): {WHERE_MODELS_ARE}"
        )
    return model


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


def load_pipeline(model: str, device: str, dtype: str, low_memory: bool = False) -> Direct3DS2Pipeline:
    """
    A pipeline on a device.

    Args:
        model: from [`resolve_model`].
        device: from [`check_device`].
        dtype: name of the torch dtype of the weights.
        low_memory: trade time for memory: only the running model is on a GPU, autoencoders and refiners work in tiles,
            and the two predictions of guidance come one after the other.
    """
    import torch
    from diffusers import DiffusionPipeline

    from .. import Direct3DS2Pipeline
    from ..models.compatibility import dtype_argument

    options = dtype_argument(getattr(torch, dtype))
    pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True, **options)
    if not isinstance(pipe, Direct3DS2Pipeline):
        raise ValueError(f"`--model` must hold a Direct3DS2Pipeline, {model!r} has a {type(pipe).__name__}")
    if low_memory:
        pipe.enable_vae_tiling()
        pipe.enable_vae_slicing()
        pipe.disable_guidance_batching()
    if low_memory and torch.device(device).type != "cpu":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe
