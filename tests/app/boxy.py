"""A tiny pipeline whose meshes are the cells of its dense stage: few triangles, quick to draw without a GPU."""

from diffusers_sparse3d import Direct3DS2Pipeline, SparseVAE
from tests.pipelines.tiny import tiny_pipeline


def make_boxy(vae: SparseVAE) -> None:
    """Gives the samples in a cell the distances of a box, nearly: all weights but those of one channel matter little.

    That channel counts the neighbours of a sample. Samples at the surface of the cells lack some and are outside, so
    that the surface does not leave the cells: it would be followed to the faces of the grid.
    """
    block, conv_out = vae.decoder.up_blocks[-1], vae.decoder.conv_out
    block.conv1.weight.data[..., 0] = 0.0
    block.conv1.bias.data[0] = 1.0
    block.conv2.weight.data[..., 0] = 0.0
    block.conv2.weight.data[:, 0, 0] = 0.3
    # 5.9 for 27 neighbours, 3.9 for the 18 at a face.
    conv_out.weight.data.mul_(0.01)
    conv_out.weight.data[:, 0] = -1.0
    conv_out.bias.data.fill_(4.9)


def boxy_pipeline(occupancy_threshold: float = 0.8) -> Direct3DS2Pipeline:
    """The tiny pipeline, with the distances of `make_boxy`."""
    pipe = tiny_pipeline(occupancy_threshold=occupancy_threshold)
    make_boxy(pipe.vae)
    return pipe
