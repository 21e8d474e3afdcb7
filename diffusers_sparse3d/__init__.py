"""Sparse-volume 3D generation (Direct3D-S2) for Hugging Face diffusers.

Importing the package registers its pipeline and models with diffusers. It imports neither torch nor diffusers: the
public names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import prefer_installed_pipelines, register_with_diffusers
from .version import __version__ as __version__


if TYPE_CHECKING:
    from .models.attention_processors import SparseAttnProcessor, SSAAttnProcessor, WindowAttnProcessor
    from .models.autoencoder_dense import DenseVAE
    from .models.autoencoder_sparse import SparseVAE
    from .models.foreign_attention import (
        enable_spatial_sparse_attention,
        enable_window_attention,
        load_spatial_sparse_attention,
    )
    from .models.refiner_sdf import SDFRefiner, SDFSignRefiner
    from .models.sparse_layers import SparseConv3d
    from .models.transformer_dense import DenseDiT
    from .models.transformer_sparse import SparseDiT
    from .ops.spatial_sparse_attention import tune_spatial_sparse_attention
    from .pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline
    from .sparse_tensor import SparseTensor


__all__ = [
    "DenseDiT",
    "DenseVAE",
    "Direct3DS2Pipeline",
    "SDFRefiner",
    "SDFSignRefiner",
    "SSAAttnProcessor",
    "SparseAttnProcessor",
    "SparseConv3d",
    "SparseDiT",
    "SparseTensor",
    "SparseVAE",
    "WindowAttnProcessor",
    "enable_spatial_sparse_attention",
    "enable_window_attention",
    "load_spatial_sparse_attention",
    "tune_spatial_sparse_attention",
]

# The module that defines each public name.
_MODULES = {
    "DenseDiT": ".models.transformer_dense",
    "DenseVAE": ".models.autoencoder_dense",
    "Direct3DS2Pipeline": ".pipelines.pipeline_direct3d_s2",
    "SDFRefiner": ".models.refiner_sdf",
    "SDFSignRefiner": ".models.refiner_sdf",
    "SSAAttnProcessor": ".models.attention_processors",
    "SparseAttnProcessor": ".models.attention_processors",
    "SparseConv3d": ".models.sparse_layers",
    "SparseDiT": ".models.transformer_sparse",
    "SparseTensor": ".sparse_tensor",
    "SparseVAE": ".models.autoencoder_sparse",
    "WindowAttnProcessor": ".models.attention_processors",
    "enable_spatial_sparse_attention": ".models.foreign_attention",
    "enable_window_attention": ".models.foreign_attention",
    "load_spatial_sparse_attention": ".models.foreign_attention",
    "tune_spatial_sparse_attention": ".ops.spatial_sparse_attention",
    # `model_index.json` names this package as the library of the components. diffusers looks in the library for the
    # base class of a component too, which tells it how to load the component.
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_diffusers(
    ("DenseDiT", "DenseVAE", "Direct3DS2Pipeline", "SDFRefiner", "SDFSignRefiner", "SparseDiT", "SparseVAE"), __name__
)
prefer_installed_pipelines(("Direct3DS2Pipeline",))
