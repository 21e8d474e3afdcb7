from diffusers_sparse3d import DenseVAE  # noqa: F401
