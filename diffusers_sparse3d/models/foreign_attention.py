"""Spatial Sparse Attention and attention in windows for transformers of other packages."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import SpatialSparseAttention
from .attention_checks import resolve_processor
from .attention_layouts import has_fused_projections, output_width
from .attention_processors import PROCESSORS, SparseAttnProcessor, SSAAttnProcessor, WindowAttnProcessor


# The entry of `config.json` that keeps how a model was equipped.
CONFIG_NAME = "spatial_sparse_attention"


class ProcessorAttention(nn.Module):
    """`forward` and `set_processor` for attention modules of other packages that have no processor of their own.

    A module gets them by a class derived from this one and its own, so its parameters keep their names.
    """

    processor: Callable[..., Tensor]

    def set_processor(self, processor: Callable[..., Tensor] | str) -> None:
        """Set "full", "window", "ssa", or a processor."""
        self.processor = resolve_processor(processor, PROCESSORS)

    def get_processor(self) -> Callable[..., Tensor]:
        """The processor in use."""
        return self.processor

    def forward(self, hidden_states: Any, coords: Tensor | None = None, **kwargs: Any) -> Any:
        """
        Args:
            hidden_states: a sparse tensor with `feats [N, C]`, `coords [N, 4]` and `replace(feats)`; or `[N, C]`.
            coords: `[N, 4]` int32 (batch, x, y, z) of a plain `hidden_states`.
            kwargs: to the processor.

        Returns:
            A sparse tensor with other features, or `[N, C]`.
        """
        if isinstance(hidden_states, Tensor):
            return self.processor(self, hidden_states, coords=coords, **kwargs)
        feats = self.processor(self, hidden_states.feats, coords=hidden_states.coords, **kwargs)
        return hidden_states.replace(feats)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so pickle cannot find it by name.
        return _empty_with_processor, (type(self).__bases__[1],), self.__dict__


def _with_processor(module_class: type[nn.Module]) -> type[nn.Module]:
    """A class of attention modules, with the methods of [`ProcessorAttention`] before its own."""
    return type(f"{module_class.__name__}WithProcessor", (ProcessorAttention, module_class), {})


def _empty_with_processor(module_class: type[nn.Module]) -> nn.Module:
    derived = _with_processor(module_class)
    return derived.__new__(derived)


def self_attention_modules(model: nn.Module) -> dict[str, Any]:
    """The self-attention modules of a model, by name.

    They have `to_q`, `to_k`, `to_v` or `to_qkv`, `to_out`, and `heads` or `num_heads`; the keys of self-attention come
    from as many channels as its queries, and it has no true `is_cross_attention`.

    Raises:
        ValueError: if there is none.
    """

    def is_self_attention(module: Any) -> bool:
        has_projections = getattr(module, "to_qkv", None) is not None or (
            all(getattr(module, name, None) is not None for name in ("to_q", "to_k", "to_v"))
            and module.to_q.in_features == module.to_k.in_features
        )
        has_heads = getattr(module, "heads", None) is not None or getattr(module, "num_heads", None) is not None
        is_cross_attention = getattr(module, "is_cross_attention", False)
        return has_projections and has_heads and getattr(module, "to_out", None) is not None and not is_cross_attention

    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    attentions = {name: module for name, module in model.named_modules() if is_self_attention(module)}
    if not attentions:
        raise ValueError(
            "`model` must have self-attention modules, with `to_q`, `to_k` and `to_v` or `to_qkv`, `to_out`, and"
            " `heads` or `num_heads`: got none"
        )
    return attentions


def enable_spatial_sparse_attention(
    model: nn.Module,
    window_size: int = 8,
    use_window_shift: bool = True,
    heads_first: bool = False,
    **config: Any,
) -> nn.Module:
    """Equip the self-attention modules of a sparse transformer with `ssa` and [`SSAAttnProcessor`], in place.

    Attention modules are found as by [`self_attention_modules`]. Those with `set_processor`, as diffusers builds them
    (its own `Attention` too), must be given `coords` with their call and hand them on to their processor; others are
    called with packed rows and `coords`, or with a sparse tensor that has `feats`, `coords` and `replace`.
    Cross-attention is left as it is. The new parameters are trained from scratch; grouped key/value heads are
    recognised.

    `save_pretrained` of the model saves the new parameters and, in its configuration, the arguments of this function;
    [`load_spatial_sparse_attention`] reads them back.

    Args:
        model: any module that contains attention modules.
        window_size: edge of the windows.
        use_window_shift: shift the windows by half their size in every odd self-attention module.
        heads_first: the channels of the projections are query, key and value of the first head, then those of the
            second, as in TripoSG; not all queries, all keys, all values.
        config: further arguments of [`SpatialSparseAttention`]: block sizes, `topk`, `compression_version` ...

    Returns:
        The model.

    Raises:
        ValueError: if `model` has no self-attention module, has `ssa` already, attends in a way that the processors
            do not know (rotary embeddings, masks, added projections ...), or an argument in `config` does not fit.
    """
    attentions = self_attention_modules(model)
    equipped = [name for name, attn in attentions.items() if getattr(attn, "ssa", None) is not None]
    if equipped:
        raise ValueError(
            f"`model` must not have `ssa` yet, whose weights would be lost, got one with it in {equipped[0]!r} (of"
            f" {len(equipped)} modules): to use them, `set_attn_processor(SSAAttnProcessor())`"
        )
    defaults = inspect.signature(SpatialSparseAttention).parameters.items()
    config = {name: value.default for name, value in defaults if value.default is not value.empty} | config
    # All are made before one is changed: an argument may not fit.
    _check(attentions, window_size, heads_first)
    new = [_make_ssa(attn, config) for attn in attentions.values()]
    _prepare(attentions, window_size, use_window_shift, heads_first)
    for attn, ssa in zip(attentions.values(), new):
        attn.ssa = ssa
        attn.set_processor(SSAAttnProcessor())
    _keep_configuration(
        model,
        {"window_size": window_size, "use_window_shift": use_window_shift, "heads_first": heads_first, **config},
    )
    return model


def _make_ssa(attn: Any, config: Mapping[str, Any]) -> SpatialSparseAttention:
    """The parameters of SSA for an attention module, on its device and in its dtype."""
    width, fused = output_width(attn), has_fused_projections(attn)
    layer = attn.to_qkv if fused else attn.to_k
    key_width = (layer.out_features - width) // 2 if fused else layer.out_features
    dim_head = width // _heads(attn)
    ssa = SpatialSparseAttention(layer.in_features, key_width // dim_head, dim_head, **config)
    # Quantised weights may be integers: the new ones are not quantised.
    dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.get_default_dtype()
    return ssa.to(layer.weight.device, dtype)


def _heads(attn: Any) -> int:
    return attn.num_heads if getattr(attn, "heads", None) is None else attn.heads


def enable_window_attention(
    model: nn.Module, window_size: int = 8, use_window_shift: bool = True, heads_first: bool = False
) -> nn.Module:
    """Let the self-attention modules of a sparse transformer attend inside windows, by [`WindowAttnProcessor`].

    There are no new parameters. Arguments, result and errors are those of [`enable_spatial_sparse_attention`].
    """
    attentions = self_attention_modules(model)
    _check(attentions, window_size, heads_first)
    _prepare(attentions, window_size, use_window_shift, heads_first)
    for attn in attentions.values():
        attn.set_processor(WindowAttnProcessor())
    return model


def load_spatial_sparse_attention(
    model: nn.Module, directory: str | Path, variant: str | None = None, subfolder: str = ""
) -> nn.Module:
    """Equip a model as the one was that is saved in `directory`, and load the parameters of its `ssa`, in place.

    `from_pretrained` knows nothing of them: it loads the other weights, warning that some were not used.

    Args:
        model: from `from_pretrained(directory)`, or of the same architecture.
        directory: what `save_pretrained` of the equipped model wrote.
        variant: of the files, for example "fp16".
        subfolder: of `directory`.

    Returns:
        The model.

    Raises:
        ValueError: if `directory` holds no equipped model, weights are missing or of another shape, or `model` has
            `ssa` already.
    """
    folder = Path(directory, subfolder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if CONFIG_NAME not in config:
        raise ValueError(
            f"`directory` must hold a model saved with Spatial Sparse Attention, got no {CONFIG_NAME!r} in"
            f" {config_file}"
        )
    weights = {name: tensor for name, tensor in _saved_tensors(folder, variant) if ".ssa." in f".{name}"}
    enable_spatial_sparse_attention(model, **config[CONFIG_NAME])
    own = {name for name, _ in model.named_parameters() if ".ssa." in f".{name}"}
    if missing := sorted(own - set(weights)):
        raise ValueError(f"`directory` must hold all weights of `ssa`, got none for {missing[:3]} in {folder}")
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"`directory` must hold weights of `ssa` that fit `model`: {error}") from error
    return model


def _saved_tensors(folder: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the safetensors files of a folder that are of the variant."""
    for file in sorted(folder.glob("*.safetensors")):
        suffixes = re.sub(r"-\d+-of-\d+", "", file.name).split(".")[1:-1]
        if suffixes != ([] if variant is None else [variant]):
            continue
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def _prepare(attentions: Mapping[str, Any], window_size: int, use_window_shift: bool, heads_first: bool) -> None:
    """Give the attention modules what the processors read and, where they have none, `set_processor`."""
    derived: dict[type[nn.Module], type[nn.Module]] = {}
    for index, attn in enumerate(attentions.values()):
        attn.heads = _heads(attn)
        attn.window_size = window_size
        attn.window_shift = window_size // 2 if use_window_shift and index % 2 else 0
        attn.heads_first = heads_first
        if not hasattr(attn, "set_processor"):
            attn.__class__ = derived.setdefault(type(attn), _with_processor(type(attn)))


def _check(attentions: Mapping[str, Any], window_size: int, heads_first: bool) -> None:
    """Raise a ValueError if a module computes something else than softmax attention of its projections.

    Attention modules of diffusers have many options, and processors of other packages arrange heads in their own ways.
    So those that can be called are compared with full attention of the projections, by numbers.
    """
    if window_size < 1:
        raise ValueError(f"`window_size` must be positive, got {window_size}")
    for name, attn in attentions.items():
        if getattr(attn, "use_rope", False):
            raise ValueError(f"`model` must not have rotary position embeddings (`use_rope`), got them in {name!r}")
        if not isinstance(attn, Attention) or isinstance(attn.processor, SparseAttnProcessor):
            continue
        if attn.to_q.weight.is_meta:
            continue
        expected, found = _outputs(attn, heads_first)
        if not torch.linalg.vector_norm(found - expected) <= 0.05 * torch.linalg.vector_norm(expected):
            advice = "leave out `heads_first`" if heads_first else "try `heads_first=True`"
            raise ValueError(
                f"`model` must compute softmax attention of `to_q`, `to_k` and `to_v`, but"
                f" {type(attn.processor).__name__} in {name!r} gives other numbers: {advice} if its heads may be"
                " arranged in the other way; options such as group norm, a residual or added projections are not"
                " supported"
            )


@torch.no_grad()
def _outputs(attn: Attention, heads_first: bool) -> tuple[Tensor, Tensor]:
    """Outputs `[5, C]` of a module of diffusers for random tokens: by its own processor, and by full attention."""
    training, previous = attn.training, getattr(attn, "heads_first", False)
    weight = attn.to_q.weight
    tokens = torch.randn(1, 5, attn.to_q.in_features, generator=torch.Generator().manual_seed(0)).to(
        weight.device, weight.dtype if weight.is_floating_point() else None
    )
    coords = torch.zeros(5, 4, dtype=torch.int32, device=weight.device)
    coords[:, 1] = torch.arange(5)
    attn.eval()
    attn.heads_first = heads_first
    try:
        return attn.processor(attn, tokens)[0].float(), SparseAttnProcessor()(attn, tokens, coords)[0].float()
    finally:
        attn.heads_first = previous
        attn.train(training)


def _keep_configuration(model: nn.Module, config: dict[str, Any]) -> None:
    """Write how the model was equipped into its configuration, which `save_pretrained` saves, if it has one."""
    if isinstance(model, ConfigMixin):
        settings = {name: value for name, value in config.items() if name != "heads_first"}
        if {"attention_type", *settings} <= set(model.config):  # a model that is built with SSA from its configuration
            model.register_to_config(attention_type="ssa", **settings)
        else:
            model.register_to_config(**{CONFIG_NAME: config})
    elif isinstance(model, PreTrainedModel):
        setattr(model.config, CONFIG_NAME, config)
