from diffusers_sparse3d import SparseVAE  # noqa: F401
