"""Files of pipelines: what a saved one has beside its components (code that imports it, a card), and loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from torch import nn

from ..files import final_name, write_text
from .inputs import stage_setting


if TYPE_CHECKING:
    from .pipeline_direct3d_s2 import Direct3DS2Pipeline


# `custom_pipeline="pipeline"` is the first one. Without `custom_pipeline`, diffusers looks for the file f"{None}.py".
REMOTE_CODE_FILES = ("pipeline.py", "None.py")
REMOTE_CODE = "from diffusers_sparse3d import Direct3DS2Pipeline  # noqa: F401\n"

# Ends a card that was written here, which may be written again; others are left alone.
CARD_END = "<!-- Written by save_pretrained. Without this line, it leaves the card alone. -->\n"


def save_companions(pipeline: Direct3DS2Pipeline, directory: Path) -> None:
    """
    Write the files beside the components of a pipeline that is being saved.

    - Code that lets `from_pretrained(directory, trust_remote_code=True)`, with `custom_pipeline="pipeline"` or
      without, find the class in code that does not import this package.
    - `README.md`, the model card, unless there is one that was not written here, or components are missing.
    - The configuration of the image encoder is made to ask for float32. diffusers loads the other models in float32
      unless told otherwise, but transformers would take the dtype of the file.

    Args:
        pipeline: the pipeline.
        directory: made if it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in REMOTE_CODE_FILES:
        write_text(directory / name, REMOTE_CODE)
    encoder_config = directory / "image_encoder" / "config.json"
    if encoder_config.exists():
        config = json.loads(encoder_config.read_text(encoding="utf-8"))
        write_text(encoder_config, json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    card = directory / "README.md"
    needed = (part for name, part in pipeline.components.items() if name not in pipeline._optional_components)
    if any(part is None for part in needed):
        return
    if not card.exists() or card.read_text(encoding="utf-8").endswith(CARD_END):
        write_text(card, model_card(pipeline, final_name(directory)))


def model_card(pipeline: Direct3DS2Pipeline, name: str) -> str:
    """The model card of a pipeline in Markdown, with the metadata that the Hub reads.

    Args:
        pipeline: the pipeline.
        name: of its folder, for the title and the example.
    """
    resolutions = " and ".join(f"{resolution}^3" for resolution in pipeline.resolutions)
    stages = "\n".join(_stage_row(pipeline, stage) for stage in pipeline.stages)
    components = "\n".join(
        f"| `{component}` | {type(module).__name__} | {_num_parameters(module)} |"
        for component, module in pipeline.components.items()
        if module is not None and component != "background_remover"
    )
    return f"""---
license: {pipeline.config.weights_license or "unknown"}
library_name: diffusers
pipeline_tag: image-to-3d
tags: [image-to-3d, diffusers_sparse3d, direct3d-s2]
---
# {name}

A pipeline of [diffusers_sparse3d](https://github.com/diffusers-sparse3d/diffusers_sparse3d): one picture of an object
to a closed mesh, as in Direct3D-S2 ([arXiv 2505.17412](https://arxiv.org/abs/2505.17412)). It generates signed
distance fields of {resolutions} samples, by default of {pipeline.resolution}^3.

```python
import torch
from diffusers import DiffusionPipeline

import diffusers_sparse3d

pipe = DiffusionPipeline.from_pretrained("{name}")  # the path of this folder, or its name on the Hub
mesh = pipe("object.png", generator=torch.Generator().manual_seed(0)).meshes[0]
mesh.export("object.glb")
```

The picture needs an alpha channel or a plain background. Code that does not import the package loads a local copy by
`from_pretrained(..., trust_remote_code=True)`, and one on the Hub with the name of the repository as `custom_pipeline`
besides.

| stage | resolution | steps | guidance scale |
| --- | --- | --- | --- |
{stages}

| component | class | parameters |
| --- | --- | --- |
{components}

Licence of the weights: {pipeline.config.weights_license or "not stated by whoever saved them"}.

{CARD_END}"""


def _stage_row(pipeline: Direct3DS2Pipeline, stage: Any) -> str:
    what = "occupied cells" if stage.name == "dense" else "signed distances"
    settings = (stage_setting(pipeline.config, stage.name, name) for name in ("num_inference_steps", "guidance_scale"))
    steps, scale = settings
    return f"| {stage.name} | {stage.resolution}^3 {what} | {steps} | {scale:g} |"


def _num_parameters(component: Any) -> str:
    if not isinstance(component, nn.Module):
        return ""
    return f"{sum(parameter.numel() for parameter in component.parameters()):,}"


class SafetensorsLoadingMixin(DiffusionPipeline):
    """Loading and saving of a whole pipeline as safetensors files alone."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """
        As [`~diffusers.DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: if `safe_serialization` is False, as `from_pretrained` would not open such files.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must not be False: pickled files are not opened again")
        return super().save_pretrained(save_directory, True, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """
        As [`~diffusers.DiffusionPipeline.from_pretrained`]; a component without a safetensors file is an error.

        Raises:
            ValueError: if `use_safetensors` is False.
            OSError: if there is no such file.
        """
        # diffusers and transformers take pickled files where safetensors files are missing, unless this is True.
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must not be False: pickled files are not opened")
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
