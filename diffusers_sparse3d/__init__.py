"""Sparse-volume 3D generation (Direct3D-S2) for Hugging Face diffusers."""

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin  # noqa: F401

from .loaders.single_file import register_single_file
from .models.attention import (
    SparseAttnProcessor,
    SSAAttnProcessor,
    WindowAttnProcessor,
    enable_spatial_sparse_attention,
)
from .models.autoencoder_dense import DenseVAE
from .models.autoencoder_sparse import SparseVAE
from .models.refiner_sdf import SDFRefiner, SDFSignRefiner
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
    "SparseDiT",
    "SparseTensor",
    "SparseVAE",
    "WindowAttnProcessor",
    "enable_spatial_sparse_attention",
    "tune_spatial_sparse_attention",
]

# How diffusers finds our classes again. `model_index.json` names the module of each component's class, in which
# diffusers looks for the class and for its base class (hence the three imports above); the pipeline's class it looks
# up by name among its own.
for _cls in (DenseDiT, DenseVAE, Direct3DS2Pipeline, SDFRefiner, SDFSignRefiner, SparseDiT, SparseVAE):
    _cls.__module__ = __name__
    if _cls.__name__ not in vars(diffusers):
        setattr(diffusers, _cls.__name__, _cls)
    if issubclass(_cls, ModelMixin):
        register_single_file(_cls)
del _cls
