from diffusers_sparse3d import SparseDiT  # noqa: F401
