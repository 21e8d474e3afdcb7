from diffusers_sparse3d import DenseDiT  # noqa: F401
