"""Evaluation: reconstructions of a VAE, and meshes that a pipeline generates, against a split of a dataset."""

from .command import evaluate, main, parse_arguments


__all__ = ["evaluate", "main", "parse_arguments"]
