"""Sparse-volume 3D generation (Direct3D-S2) for Hugging Face diffusers."""
