"""Data preparation: meshes to a dataset of sparse SDFs, occupancies and conditioning images."""

from .command import main, parse_arguments, prepare
from .index import MeshEntry, read_index


__all__ = ["MeshEntry", "main", "parse_arguments", "prepare", "read_index"]
