"""Triton kernels of mean pooling, each with its launcher. They need the package triton.

Every coarse voxel adds up its own children, so nothing is added by atomics.
"""
