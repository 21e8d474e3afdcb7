"""LoRA on the pipeline: loading, saving, weighting, fusing and removing adapters of its transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND, logging, set_weights_and_activate_adapters
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import PARTIAL, sync
from .lora_files import LoraAdapter, read_lora_file, split_by_component


logger = logging.get_logger(__name__)

LORA_COMPONENTS = ("transformer", "dense_transformer", "transformer_1024")
LoraLayers = nn.Module | dict[str, Tensor]


def _check_peft() -> None:
    if not USE_PEFT_BACKEND:
        raise ImportError("LoRA needs the package peft: `pip install peft`")


class Direct3DS2LoraLoaderMixin(LoraBaseMixin):
    """
    Loads LoRA (and DoRA) weights into the transformers of [`Direct3DS2Pipeline`]: `transformer`, `dense_transformer`
    and `transformer_1024`.

    The methods are those of diffusers' pipelines. `set_adapters`, `enable_lora`, `disable_lora`, `delete_adapters`,
    `get_list_adapters`, `set_lora_device`, `unload_lora_weights` and `enable_lora_hotswap` act on all three.
    """

    _lora_loadable_modules = list(LORA_COMPONENTS)

    @property
    def _lora_models(self) -> dict[str, Any]:
        """The transformers by name; None where the pipeline does not have the second sparse stage."""
        return {name: getattr(self, name, None) for name in self._lora_loadable_modules}

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any] | None]:
        """
        The tensors of a LoRA file, named as peft names them after the name of their component.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A safetensors file, a folder with one, a hub id, or the tensors by name.
            return_lora_metadata (`bool`, defaults to `False`): Return the settings of the file too, or None.
            kwargs (*optional*): `weight_name`, the file in the folder or repository, and `cache_dir`,
                `force_download`, `proxies`, `local_files_only`, `token`, `revision` and `subfolder`, as in
                `from_pretrained`. `use_safetensors` can be true alone: pickled files are never read.

        Raises:
            ValueError: if the file is no safetensors file or holds something else than LoRA weights.
            OSError: if there is no such file.
        """
        weights, metadata = read_lora_file(pretrained_model_name_or_path_or_dict, **kwargs)
        return (weights, metadata) if return_lora_metadata else weights

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        component: str | None = None,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Load LoRA weights into the transformers that they are of, and make them active.

        Everything is checked first: a file that does not fit changes nothing.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A safetensors file, a folder with one, a hub id, or the tensors by name, in the layout of diffusers
                (`transformer...lora_A.weight`) or of peft (`base_model.model...lora_A.weight`).
            adapter_name (`str`, *optional*): Name of the adapter; "default_0", "default_1", ... by default.
            hotswap (`bool`, defaults to `False`):
                Replace the weights of the loaded adapter `adapter_name` in place, without recompiling.
            component (`str`, *optional*):
                The transformer that weights without the name of a component are for, as peft saves them:
                "transformer", "dense_transformer" or "transformer_1024". By default the only one that they fit.
            low_cpu_mem_usage (`bool`, defaults to `True`): Make the layers without initialising them first.
            kwargs (*optional*): See [`lora_state_dict`].

        Raises:
            ValueError: if nothing in the file fits the pipeline, a module or a shape is not that of the model, the
                beginning of a name is no component, or `adapter_name` is taken (or, with `hotswap`, is not there).
            ImportError: without peft.
        """
        _check_peft()
        weights, metadata = read_lora_file(pretrained_model_name_or_path_or_dict, **kwargs)
        adapters = split_by_component(weights, metadata, self._lora_models, component)
        if left_out := sorted({name.partition(".")[0] for name in weights} & set(self._lora_models) - set(adapters)):
            logger.warning(f"The pipeline has no {' and no '.join(left_out)}: their LoRA weights are left out.")
        adapter_name = self._check_adapter_name(adapter_name, adapters, hotswap)
        for name, adapter in adapters.items():
            self._lora_models[name].load_lora_adapter(
                adapter.weights,
                prefix=None,
                metadata=adapter.config,
                adapter_name=adapter_name,
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,
            )

    def _check_adapter_name(self, name: str | None, adapters: dict[str, LoraAdapter], hotswap: bool) -> str:
        """Returns the name of a new adapter, the same for all components."""
        present = self.get_list_adapters()
        owners = [component for component, names in present.items() if name in names]
        if hotswap and set(owners) != set(adapters):
            raise ValueError(
                f"`adapter_name` must be a loaded adapter of {' and '.join(adapters)} for `hotswap`, got {name!r}, of"
                f" {' and '.join(owners) or 'none'}"
            )
        if owners and not hotswap:
            raise ValueError(f"`adapter_name` {name!r} is already in use in {' and '.join(owners)}")
        taken = {taken for names in present.values() for taken in names}
        return name or next(free for n in range(len(taken) + 1) if (free := f"default_{n}") not in taken)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: LoraLayers | None = None,
        dense_transformer_lora_layers: LoraLayers | None = None,
        transformer_1024_lora_layers: LoraLayers | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        dense_transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        transformer_1024_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Save LoRA weights in a file that `load_lora_weights` loads.

        Args:
            save_directory (`str` or `os.PathLike`): Folder; made if it is not there.
            transformer_lora_layers, dense_transformer_lora_layers, transformer_1024_lora_layers
                (`torch.nn.Module` or `dict`, *optional*):
                Weights of each transformer, as `peft.utils.get_peft_model_state_dict(transformer)` gives them.
            is_main_process (`bool`, defaults to `True`): Whether this process writes; the others do nothing.
            weight_name (`str`, *optional*): Name of the file; "pytorch_lora_weights.safetensors" by default.
            save_function (`Callable`, *optional*): Called as `save_function(tensors, path)` in place of safetensors'.
            safe_serialization (`bool`, defaults to `True`): Must be true: pickled files are not written.
            transformer_lora_adapter_metadata, dense_transformer_lora_adapter_metadata,
            transformer_1024_lora_adapter_metadata (`dict`, *optional*):
                Settings of each adapter, as `transformer.peft_config[adapter_name].to_dict()` gives them. Without
                them, alpha is the rank when the file is loaded.

        Raises:
            ValueError: if no layers are given, or `safe_serialization` is false.
        """
        layers = (transformer_lora_layers, dense_transformer_lora_layers, transformer_1024_lora_layers)
        metadata = (
            transformer_lora_adapter_metadata,
            dense_transformer_lora_adapter_metadata,
            transformer_1024_lora_adapter_metadata,
        )
        if not any(layers):
            raise ValueError(
                f"`save_lora_weights` must get one of {', '.join(f'{n}_lora_layers' for n in LORA_COMPONENTS)}"
            )
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be true: LoRA weights are saved as safetensors, never pickled")
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, got the file {save_directory}")
        if not is_main_process:
            return
        weights: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for name, own, own_settings in zip(LORA_COMPONENTS, layers, metadata):
            if own:
                weights.update(cls.pack_weights(own, name))
                settings.update({f"{name}.{key}": value for key, value in (own_settings or {}).items()})
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (weight_name or LORA_WEIGHT_NAME_SAFE)
        if save_function is not None:
            save_function(weights, str(path))
        else:
            _write_weights(path, weights, settings)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Save the pipeline, see [`~diffusers.DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: while adapters are loaded, whose layers the folder could not be loaded with.
        """
        if adapters := self.get_list_adapters() if USE_PEFT_BACKEND else {}:
            raise ValueError(
                f"A pipeline must be saved without adapters, this one has some in {' and '.join(adapters)}:"
                " `unload_lora_weights()` leaves them out; `fuse_lora()` before it puts them into the saved weights"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict[str, float] | Sequence[float | dict[str, float] | None] | None = None,
    ) -> None:
        """
        Make adapters active, all others inactive, and set their weights.

        Args:
            adapter_names (`str` or `list[str]`): The adapters to use together.
            adapter_weights (`float`, `dict` or a list of these, *optional*):
                Weight of the adapters, one for all or one for each: a number, or numbers by the name of the
                transformer, `{"transformer": 0.5, "dense_transformer": 1.0}`; 1 where nothing is said.

        Raises:
            ValueError: for an adapter or a component that is not there, or lists of different lengths.
        """
        _check_peft()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        each = list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(each) != len(names):
            raise ValueError(
                f"`adapter_weights` must have the length of `adapter_names`, {len(names)}, got {len(each)}"
            )
        given = {name for weight in each if isinstance(weight, dict) for name in weight}
        if unknown := sorted(given - set(self._lora_loadable_modules)):
            components = ", ".join(self._lora_loadable_modules)
            raise ValueError(f"`adapter_weights` must have keys of {components}, got {', '.join(unknown)}")
        present = self.get_list_adapters()
        loaded = {name for owned in present.values() for name in owned}
        if missing := sorted(set(names) - loaded):
            raise ValueError(f"`adapter_names` must be of {sorted(loaded)}, got {', '.join(missing)}")
        for component in present:
            own = [weight.get(component) if isinstance(weight, dict) else weight for weight in each]
            weights = [1.0 if weight is None else weight for weight in own]
            set_weights_and_activate_adapters(self._lora_models[component], names, weights)

    def get_active_adapters(self) -> list[str]:
        """The names of the active adapters of all transformers, each once."""
        _check_peft()
        names: dict[str, None] = {}
        for component, present in self.get_list_adapters().items():
            active = self._lora_models[component].active_adapters()
            active = [active] if isinstance(active, str) else active
            names.update(dict.fromkeys(name for name in active if name in present))
        return list(names)

    def fuse_lora(
        self,
        components: Sequence[str] = LORA_COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Add the LoRA weights to those of the transformers: the same result, without the time of the additional layers.

        Args:
            components (`list[str]`): The transformers; all by default.
            lora_scale (`float`, defaults to 1.0): Factor of the weights of the adapters.
            safe_fusing (`bool`, defaults to `False`): Leave a layer alone where the sum would have NaN in it.
            adapter_names (`list[str]`, *optional*): The adapters; the active ones by default.

        Raises:
            ValueError: for a component that there is not.
        """
        super().fuse_lora(list(components), lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: Sequence[str] = LORA_COMPONENTS, **kwargs: Any) -> None:
        """
        Take the LoRA weights out of those of the transformers again, up to rounding, and undo `lora_scale` of
        [`fuse_lora`]. To have the very weights of before, load the model anew.

        Args:
            components (`list[str]`): The transformers; all by default.

        Raises:
            ValueError: for a component that there is not.
        """
        super().unfuse_lora(list(components), **kwargs)
        from peft.tuners.lora import LoraLayer

        for name in components:
            model = self._lora_models[name]
            scale = getattr(model, "lora_scale", 1.0)
            if model is not None and scale not in (0.0, 1.0):
                model.lora_scale = 1.0
                for module in model.modules():
                    if isinstance(module, LoraLayer):
                        module.unscale_layer(scale)


def _write_weights(path: Path, weights: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Writes a safetensors file, the old or the new one at any moment, with the settings as diffusers writes them."""
    header = {"format": "pt"}
    if settings:
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(plain, indent=2, sort_keys=True)
    # Not with the suffix by which the weights in a folder are found.
    partial = path.with_name(f".{path.name}{PARTIAL}")
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, partial, metadata=header)
    sync(partial)
    partial.replace(path)
    sync(path.parent)
