"""Loading from the published checkpoint files, common to all models that can."""

from __future__ import annotations

import os
from typing import Any

from diffusers.loaders import FromOriginalModelMixin
from typing_extensions import Self


class OriginalCheckpointMixin(FromOriginalModelMixin):
    """diffusers' single-file loading, which takes the configuration from the `config.yaml` beside the file."""

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: str | os.PathLike | dict[str, Any], **kwargs: Any
    ) -> Self:
        """
        Load the model from a checkpoint file of the published layout, as
        [`~diffusers.loaders.FromOriginalModelMixin.from_single_file`] does.

        Args:
            pretrained_model_link_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A file such as `model_sparse_512.ckpt`, an address of one on the Hub, or what such a file contains.
            original_config (`str`, `os.PathLike` or `dict`, *optional*):
                The published `config.yaml`, what it contains, or one entry of it; by default, if `config` is not given
                either, the `config.yaml` in the folder of the file.
            original_entry (`str`, *optional*):
                Which entry describes the model, for example `"sparse_dit_1024"`, where there are several for its class
                and the file name does not tell.
            config (`str`, *optional*): A folder or Hub repository with a configuration of this package instead.
            kwargs: `dtype`, `device`, `subfolder` and more, as in diffusers.

        Raises:
            ValueError: if there is no configuration or it does not fit, or parameters are missing, unexpected or
                wrongly shaped.
        """
        # Imported here, because `loaders` is above the models and only this method needs the published layout.
        from ..loaders.single_file import register_single_file

        register_single_file(cls)
        source = pretrained_model_link_or_path_or_dict
        if not isinstance(source, dict):
            source = os.fspath(source)
            kwargs["original_file"] = os.path.basename(source)
        original_config = kwargs.pop("original_config", None)
        if original_config is None and kwargs.get("config") is None:
            original_config = "" if isinstance(source, dict) else os.path.join(os.path.dirname(source), "config.yaml")
            if not os.path.isfile(original_config):
                raise ValueError(
                    "The parameters alone do not tell the configuration: give `original_config`, the published"
                    " config.yaml, or `config`, a folder with a configuration of this package"
                )
        if original_config is not None:
            kwargs["original_config"] = original_config if isinstance(original_config, dict) else str(original_config)
        return super().from_single_file(source, **kwargs)
