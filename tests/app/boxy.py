"""A tiny pipeline whose meshes are the cells of its dense stage: few triangles, quick to draw without a GPU."""

from diffusers_sparse3d import Direct3DS2Pipeline
from tests.pipelines.tiny import tiny_pipeline


def boxy_pipeline(occupancy_threshold: float = 0.8) -> Direct3DS2Pipeline:
    """The tiny pipeline, with distances that are those of the inside everywhere in its cells."""
    pipe = tiny_pipeline(occupancy_threshold=occupancy_threshold)
    pipe.vae.decoder.conv_out.weight.data.mul_(0.01)
    pipe.vae.decoder.conv_out.bias.data.fill_(-0.5)
    return pipe
