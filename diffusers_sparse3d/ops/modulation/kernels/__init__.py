"""Triton kernels of timestep modulation: one kernel with its launcher a file."""
