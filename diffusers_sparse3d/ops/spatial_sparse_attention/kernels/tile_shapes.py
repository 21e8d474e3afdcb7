"""The tile shapes of the kernels of Spatial Sparse Attention: tuned ones from disk, or those that ship.

A plan keeps the shapes that it was made for, and launches take them from the plan: tuning changes later plans only.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from huggingface_hub import cached_assets_path

from ...runtime.dispatch import dot_precision
from .arguments import SMALLEST, AttentionShapes, HeadShape, TileShape


class TileShapes(NamedTuple):
    """The tile shapes of all kernels that have tiles."""

    compressed_forward: TileShape
    compressed_query_gradient: TileShape
    compressed_key_gradient: TileShape
    selection_forward: TileShape
    selection_query_gradient: TileShape
    selection_key_gradient: TileShape
    window_forward: TileShape
    window_query_gradient: TileShape
    window_key_gradient: TileShape

    def of(self, branch: str) -> AttentionShapes:
        """The shapes of the kernels of "compressed", "selection" or "window" attention."""
        return AttentionShapes(*(getattr(self, f"{branch}_{kernel}") for kernel in AttentionShapes._fields))

    @property
    def numbers(self) -> tuple[int, ...]:
        """All numbers in one tuple, as operators of PyTorch take them."""
        return tuple(itertools.chain.from_iterable(self))

    @classmethod
    @functools.lru_cache
    def from_numbers(cls, numbers: tuple[int, ...]) -> TileShapes:
        """The shapes with these `numbers`."""
        size = len(TileShape._fields)
        return cls(*(TileShape(*numbers[start : start + size]) for start in range(0, len(numbers), size)))


def is_possible(shape: TileShape, heads: HeadShape) -> bool:
    """Whether the kernels can have tiles of this shape, on a GPU that has room for it."""
    powers = all(number > 0 and number & (number - 1) == 0 for number in (shape.rows, shape.keys, shape.num_warps))
    return powers and shape.rows >= max(SMALLEST, heads.group) and shape.keys >= SMALLEST and shape.num_stages > 0


def forward_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """The shape that ships for the forward kernel of window attention, and of compressed attention of wide heads."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 2)
    return TileShape(128, 32, 4, 3) if widest <= 64 else TileShape(64, 64, 4, 2)


def compressed_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """The shape that ships for the forward kernel of compressed attention."""
    # Twice the keys are a sixth fewer instructions a score; for wider heads they do not fit in the registers.
    if dtype != torch.float32 and max(heads.dim, heads.value_dim) <= 32:
        return TileShape(128, 64, 4, 3)
    return forward_shape(heads, dtype)


def query_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """The shape that ships for the gradient of the queries of compressed and window attention."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    if widest <= 32:
        return TileShape(128, 32, 4, 3)
    return TileShape(64, 64, 4, 2) if widest <= 64 else TileShape(64, 64, 8, 1)


def key_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """The shape that ships for the gradients of the keys and values of compressed and window attention."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    if widest <= 64:
        return TileShape(64, 64, 4, 3 if widest <= 32 else 2)
    return TileShape(64, 64, 8, 1)


def choice_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """The shape that ships for the kernels of selected attention whose programs have a piece of choices."""
    widest = max(heads.dim, heads.value_dim)
    if dtype == torch.float32:
        return TileShape(32, 32, 4 if widest <= 64 else 8, 1)
    return TileShape(128, 32, 4, 3) if widest <= 64 else TileShape(64, 64, 4, 2)


def list_key_shape(heads: HeadShape, dtype: torch.dtype) -> TileShape:
    """The shape that ships for the gradients of the keys and values of selected attention."""
    shape = key_shape(heads, dtype)
    # Rows are gathered: addresses are loaded first, so that more loads must be on their way.
    return shape._replace(num_stages=5) if dtype != torch.float32 and max(heads.dim, heads.value_dim) <= 32 else shape


def default_shapes(heads: HeadShape, dtype: torch.dtype) -> TileShapes:
    """The shapes that ship, timed on Hopper. On Ampere no kernel needs more than 84 KiB of shared memory."""
    gradients = (query_shape(heads, dtype), key_shape(heads, dtype))
    choices = choice_shape(heads, dtype)
    selection = (choices, choices, list_key_shape(heads, dtype))
    return TileShapes(compressed_shape(heads, dtype), *gradients, *selection, forward_shape(heads, dtype), *gradients)


def shapes_for(heads: HeadShape, dtype: torch.dtype, device: torch.device) -> TileShapes:
    """The tuned shapes for these heads on this device, or those that ship if there are none."""
    return _tuned(_Identity.of(heads, dtype, device)) or default_shapes(heads, dtype)


def save_shapes(shapes: TileShapes, heads: HeadShape, dtype: torch.dtype, device: torch.device) -> Path:
    """Writes shapes to disk: `shapes_for` returns them from now on, in other processes from their first use on."""
    identity = _Identity.of(heads, dtype, device)
    path = identity.path
    # Each process writes a file of its own and then renames it: readers never see half of a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(identity._asdict() | {"heads": heads._asdict(), "shapes": shapes._asdict()}, file, indent=1)
    os.replace(file.name, path)
    _tuned.cache_clear()
    return path


class _Identity(NamedTuple):
    """The conditions that tuned shapes are for: with another GPU, triton or kernel, other shapes may be the best."""

    gpu: str
    triton: str
    source: str
    dtype: str
    precision: str
    heads: HeadShape

    @classmethod
    def of(cls, heads: HeadShape, dtype: torch.dtype, device: torch.device) -> _Identity:
        """The conditions of this process."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(gpu, triton.__version__, _source_hash(), str(dtype), dot_precision(dtype), heads)

    @property
    def path(self) -> Path:
        """The file of these conditions: one for each, so that outdated ones are never read."""
        return _directory() / f"{hashlib.sha256(repr(self).encode()).hexdigest()[:32]}.json"


@functools.cache
def _source_hash() -> str:
    """A hash of the sources of this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _directory() -> Path:
    """The folder of the tuned shapes."""
    return cached_assets_path(library_name="diffusers_sparse3d", namespace="tile_shapes")


@functools.cache
def _tuned(identity: _Identity) -> TileShapes | None:
    """The saved shapes; None if there are none, or none that can be used."""
    try:
        stored = json.loads(identity.path.read_text(encoding="utf-8"))["shapes"]
        shapes = TileShapes(**{kernel: TileShape(*map(int, numbers)) for kernel, numbers in stored.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    possible = all(is_possible(shape, identity.heads) for shape in shapes)
    return shapes if possible else None
