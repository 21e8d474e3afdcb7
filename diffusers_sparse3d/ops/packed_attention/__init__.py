"""Attention over packed segments of different lengths: windows, samples, self- and cross-attention."""

from .api import packed_attention, partitioned_attention


__all__ = ["packed_attention", "partitioned_attention"]
