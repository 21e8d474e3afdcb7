from diffusers_sparse3d import Direct3DS2Pipeline  # noqa: F401
