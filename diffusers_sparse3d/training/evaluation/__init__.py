"""Evaluation: reconstructions of a VAE, and meshes that a pipeline generates, against a split of a dataset.

`command` has the command line. Nothing is imported here: worker processes need the comparison of meshes alone.
"""
