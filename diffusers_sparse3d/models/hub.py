"""Loading and saving of models in the ways of the Hub: safetensors alone, and classes that `AutoModel` finds."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin

from ..files import write_text
from .config_checks import check_configuration


# Module in the folder of a saved model, by which `AutoModel` imports the class.
REMOTE_MODULE = "modeling"


class HubModelMixin(ModelMixin, ConfigMixin):
    """
    `ModelMixin` whose `from_pretrained` never opens a pickled file, and whose `save_pretrained` writes a module that
    lets `AutoModel.from_pretrained(folder, trust_remote_code=True)` find the class in code that does not import this
    package.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """
        As [`~diffusers.ModelMixin.from_pretrained`], from safetensors files alone.

        Raises:
            ValueError: if `use_safetensors` is False.
        """
        # diffusers takes pickled files where safetensors files are missing, unless this is True.
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must not be False: pickled files are not opened")
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """
        As in diffusers, with the values checked: before any layer is made, and when one is changed later.

        Raises:
            ValueError: naming the parameter that is out of range.
        """
        parameters = inspect.signature(type(self)).parameters
        # Annotations are strings, as everywhere in this package.
        optional = [name for name, parameter in parameters.items() if "None" in str(parameter.annotation)]
        check_configuration(kwargs, optional)
        super().register_to_config(**kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.to`, with the checks of diffusers."""
        dtypes = [value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
        if dtypes and not self._keep_in_fp32_modules and not getattr(self, "is_quantized", False):
            # diffusers would warn at each cast of modules that should stay in float32, and name none.
            torch.nn.Module.to(self, dtypes[0])
            args = tuple(value for value in args if not isinstance(value, torch.dtype))
            kwargs.pop("dtype", None)
            if not args and "device" not in kwargs:
                return self
        return super().to(*args, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as `config.json` holds it, with `auto_map` for classes of this package."""
        text = super().to_json_string()
        if not self._is_public():
            return text
        config = {**json.loads(text), "auto_map": {"AutoModel": f"{REMOTE_MODULE}.{type(self).__name__}"}}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write `config.json`, and the module that `auto_map` names."""
        super().save_config(save_directory, *args, **kwargs)
        if self._is_public():
            code = f"from diffusers_sparse3d import {type(self).__name__}  # noqa: F401\n"
            write_text(Path(save_directory, f"{REMOTE_MODULE}.py"), code)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Split a configuration into arguments of `__init__` and others; `auto_map` is neither."""
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def _is_public(cls) -> bool:
        """Whether the class is one of this package, and not derived from one elsewhere."""
        return cls.__module__ == "diffusers_sparse3d"
