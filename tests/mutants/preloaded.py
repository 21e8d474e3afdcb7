"""What the fork server imports once for all runs: third-party packages alone, as each run has a package of its own."""

import os

import torch


# As `tests/conftest.py` says; transformers imports Triton, which reads this then.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import accelerate.utils  # noqa: F401
import diffusers.loaders
import diffusers.models.modeling_utils
import diffusers.models.transformers
import diffusers.pipelines.pipeline_utils  # noqa: F401
import hypothesis.strategies  # noqa: F401
import peft  # noqa: F401
import PIL.Image  # noqa: F401
import pytest  # noqa: F401
import scipy.ndimage
import scipy.sparse.csgraph
import scipy.spatial  # noqa: F401
import transformers  # noqa: F401
import trimesh  # noqa: F401
