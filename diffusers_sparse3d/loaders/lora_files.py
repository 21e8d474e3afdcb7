"""LoRA weights of a file: their names in one form, and the component and the peft configuration that they belong to.

Names that are read, with or without the name of a component before them:

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight                  diffusers, and `save_lora_weights`
    base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight             peft, with adapter_config.json beside
    transformer.transformer_blocks.0.attn1.to_q.lora_down.weight and .alpha    as other trainers write them

Only safetensors files are read.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import _get_model_file, logging
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn


logger = logging.get_logger(__name__)

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
# The suffix of each tensor of a LoRA or DoRA layer, as peft names it, by how it may be written.
SUFFIXES = {
    "lora_A.weight": "lora_A.weight",
    "lora_B.weight": "lora_B.weight",
    "lora_B.bias": "lora_B.bias",
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "alpha": "alpha",
}
# Settings of `peft.LoraConfig` that the result depends on and the tensors do not tell. All others matter in training
# alone, or would change the weights of the model when the layers are made.
SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora")

StateDict = dict[str, Tensor]


@dataclass
class LoraAdapter:
    """The LoRA weights of one component.

    Attributes:
        weights: Tensors by the names of peft, MODULE.lora_A.weight and so on.
        config: Arguments of `peft.LoraConfig`.
    """

    weights: StateDict
    config: dict[str, Any]


def split_name(name: str) -> tuple[str, str]:
    """Returns the module and the suffix, as peft has it, of the name of a LoRA tensor; ("", "") for other names."""
    for written in sorted(SUFFIXES, key=len, reverse=True):
        if name.endswith(f".{written}"):
            return name[: -len(written) - 1], SUFFIXES[written]
    return "", ""


def read_lora_file(
    source: str | os.PathLike | Mapping[str, Tensor],
    weight_name: str | None = None,
    use_safetensors: bool | None = None,
    **hub_arguments: Any,
) -> tuple[StateDict, dict[str, Any] | None]:
    """Returns the tensors of a LoRA, named as peft names them after the name of the component, and its settings.

    Args:
        source: File, folder, hub id, or the tensors by name.
        weight_name: File in the folder or repository.
        use_safetensors: Must not be False, as pickled files are never read.
        hub_arguments: `cache_dir`, `force_download`, `proxies`, `local_files_only`, `token`, `revision` and
            `subfolder`, as in `from_pretrained`.

    Returns:
        The tensors; and the settings, as `diffusers` (with the names of components) or `peft` (without) wrote them
        beside, or None.

    Raises:
        ValueError: if the file is no safetensors file, or a tensor in it is not of a LoRA.
        OSError: if there is no such file.
    """
    known = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
    if unknown := sorted(set(hub_arguments) - set(known)):
        raise TypeError(f"`load_lora_weights` takes {', '.join(known)}, got the unknown {', '.join(unknown)}")
    names = [name for name in (weight_name, source) if isinstance(name, (str, os.PathLike))]
    pickled = [str(name) for name in names if Path(name).suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl")]
    if use_safetensors is False or pickled:
        raise ValueError(
            f"LoRA weights must be a safetensors file, got {pickled[0] if pickled else 'use_safetensors=False'};"
            " pickled files are not read, as they can run any code"
        )
    options = {name: hub_arguments.get(name) for name in known}
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source) and options["subfolder"]:
        # diffusers would take a file of the folder itself before one of the subfolder.
        source, options["subfolder"] = os.path.join(source, options["subfolder"]), None
    options["force_download"] = bool(options["force_download"])
    options["user_agent"] = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    if isinstance(source, Mapping):
        tensors, metadata = dict(source), None
    else:
        try:
            tensors, metadata = _fetch_state_dict(
                os.fspath(source), weight_name, use_safetensors=True, allow_pickle=False, **options
            )
        except SafetensorError as error:
            raise ValueError(f"LoRA weights must be a safetensors file, {source} is none: {error}") from error
        except Exception as error:  # of any HTTP library
            if os.path.exists(source):
                raise
            message = f"LoRA weights {os.fspath(source)!r} are neither a file nor a folder, and the Hub gives none"
            raise OSError(f"{message}: {error}") from error
        if metadata is None and any(name.startswith(PEFT_PREFIX) for name in tensors):
            metadata = _read_peft_config(os.fspath(source), options)
    strangers = [name for name in tensors if not split_name(name)[0]]
    if strangers or not tensors:
        raise ValueError(
            "LoRA weights must have names that end in `lora_A.weight`, `lora_B.weight`, `lora_down.weight`,"
            f" `lora_up.weight`, `alpha` or `lora_magnitude_vector`, got {_some(strangers) or 'no tensors at all'}"
        )
    weights = {}
    for name, tensor in tensors.items():
        module, suffix = split_name(name.removeprefix(PEFT_PREFIX))
        weights[f"{module}.{suffix}"] = tensor
    return weights, metadata


def _read_peft_config(source: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the adapter_config.json beside the weights that peft wrote; None if there is none."""
    source = os.path.dirname(source) or "." if os.path.isfile(source) else source
    try:
        path = _get_model_file(source, weights_name=PEFT_CONFIG, **options)
    except OSError as error:
        absent = error.__cause__ is None or isinstance(error.__cause__, EntryNotFoundError)
        if not absent or isinstance(error.__cause__, LocalEntryNotFoundError):
            logger.warning(
                f"Whether {source} has an {PEFT_CONFIG} could not be found out ({error}): these LoRA weights are added"
                " as they are, with an alpha of their rank."
            )
        return None
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"`peft_type` in {path} must be 'LORA', got {config['peft_type']!r}")
    return config


def split_by_component(
    weights: StateDict,
    metadata: dict[str, Any] | None,
    components: Mapping[str, nn.Module | None],
    component: str | None,
) -> dict[str, LoraAdapter]:
    """Returns the adapters in LoRA weights by the name of the component, checked against the modules there.

    Args:
        weights: Tensors of `read_lora_file`.
        metadata: Settings of `read_lora_file`.
        components: Models that can have a LoRA by name; None where the pipeline does not have one.
        component: The component that weights without the name of a component are for; if None, the only one that
            they fit.

    Raises:
        ValueError: if nothing fits, names begin with what is no component, or a module or a shape is not that of the
            model.
    """
    if component is not None and component not in components:
        raise ValueError(f"`component` must be one of {', '.join(components)}, got {component!r}")
    named = {name: prefix for name in weights if (prefix := name.partition(".")[0]) in components}
    if named and len(named) < len(weights):
        others = sorted({name.partition(".")[0] for name in weights if name not in named})
        raise ValueError(
            f"LoRA weights must begin with {', '.join(components)}, got some that begin with {_some(others)}"
        )
    if named and component is not None and set(named.values()) != {component}:
        owners = _some(sorted(set(named.values())))
        raise ValueError(f"`component` is for weights without the name of a component; these are of {owners}")
    if not named:
        component = component or _only_match(weights, components)
        return {component: _make_adapter(component, _model(component, components), weights, metadata)}
    adapters = {}
    for name, model in components.items():
        part = {key.partition(".")[2]: tensor for key, tensor in weights.items() if named[key] == name}
        own = {key.partition(".")[2]: value for key, value in (metadata or {}).items() if key.startswith(f"{name}.")}
        if part and model is not None:
            adapters[name] = _make_adapter(name, model, part, own or None)
    if not adapters:
        raise ValueError(
            f"These LoRA weights are of {_some(sorted(set(named.values())))}, which the pipeline does not have"
        )
    return adapters


def _model(name: str, components: Mapping[str, nn.Module | None]) -> nn.Module:
    model = components[name]
    if model is None:
        raise ValueError(f"`component` must be one that the pipeline has, got {name!r}")
    return model


def _only_match(weights: StateDict, components: Mapping[str, nn.Module | None]) -> str:
    """Returns the name of the component that weights without such a name fit in all modules and shapes."""
    present = {name: model for name, model in components.items() if model is not None}
    fitting = [name for name, model in present.items() if not _misfits(weights, model)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"These LoRA weights fit {' and '.join(fitting)}: `component` must say which is meant")
    beginnings = sorted({name.partition(".")[0] for name in weights})
    misfit = "; ".join(f"{name}: {_some(_misfits(weights, model), 1)}" for name, model in present.items())
    raise ValueError(
        f"LoRA weights must begin with {', '.join(components)} or fit one of these in all modules, got names that"
        f" begin with {_some(beginnings)} ({misfit})"
    )


def _misfits(weights: StateDict, model: nn.Module) -> list[str]:
    """Returns why LoRA weights do not fit a model: modules that are not there, layers of another size."""
    modules = dict(model.named_modules())
    misfits = []
    for name, tensor in weights.items():
        path, suffix = split_name(name)
        module: Any = modules.get(path)
        module = getattr(module, "base_layer", module)
        if module is None:
            misfits.append(f"it has no module {path}")
        elif isinstance(module, nn.Linear):
            expected = {"lora_A.weight": (1, module.in_features), "lora_B.weight": (0, module.out_features)}
            axis, size = expected.get(suffix, (0, None))
            if size is not None and tensor.shape[axis] != size:
                misfits.append(f"{name} must have {size} in axis {axis}, got the shape {tuple(tensor.shape)}")
    # A module has two matrices.
    return list(dict.fromkeys(misfits))


def _make_adapter(name: str, model: nn.Module, weights: StateDict, metadata: dict[str, Any] | None) -> LoraAdapter:
    """Returns the adapter of one component, whose alphas, `MODULE.alpha`, become part of its configuration."""
    if misfits := _misfits(weights, model):
        raise ValueError(f"These LoRA weights do not fit {name}: {_some(misfits)}")
    tensors = {key: tensor for key, tensor in weights.items() if split_name(key)[1] != "alpha"}
    alphas = {split_name(key)[0]: float(tensor) for key, tensor in weights.items() if split_name(key)[1] == "alpha"}
    modules = sorted({split_name(key)[0] for key in tensors})
    incomplete = [m for m in modules if not {f"{m}.lora_A.weight", f"{m}.lora_B.weight"} <= set(tensors)]
    if incomplete or not modules:
        raise ValueError(f"LoRA weights must have both matrices of a layer; one is missing of {_some(incomplete)}")
    ranks = {module: tensors[f"{module}.lora_A.weight"].shape[0] for module in modules}
    rank, rank_pattern = _most_common(ranks)
    config: dict[str, Any] = {
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": modules,
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
        "lora_bias": any(key.endswith("lora_B.bias") for key in tensors),
    }
    if metadata is None:
        # Without a word on alpha, a layer adds B A x as it is: alpha is the rank.
        config["lora_alpha"], config["alpha_pattern"] = _most_common({**ranks, **alphas})
    else:
        config.update({key: metadata[key] for key in SETTINGS if metadata.get(key) is not None})
        patterns = {_exactly(module): alpha for module, alpha in alphas.items()}
        config["alpha_pattern"] = {**patterns, **config.get("alpha_pattern", {})}
    return LoraAdapter(tensors, config)


def _exactly(module: str) -> str:
    """The pattern by which peft finds this module alone."""
    return f"^{re.escape(module)}"


def _most_common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Returns the value that most modules have, and the others by the pattern of their module."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {_exactly(module): value for module, value in values.items() if value != common}


def _some(names: Collection[str], limit: int = 3) -> str:
    """The first of some names, in words."""
    shown = ", ".join(list(names)[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
