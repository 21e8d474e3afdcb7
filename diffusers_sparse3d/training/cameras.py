"""Cameras of the pictures of a dataset, and the loss of those that a transformer predicts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.records import CAMERA_COLUMNS
from ..pipelines.image_processor import Sparse3DImageProcessor
from .dataset import SparseSDFDataset


# The columns that a camera of `project` is made of.
NEEDED_COLUMNS = tuple(name for name in CAMERA_COLUMNS if name != "focal_lengths")
# Degrees that a camera may be off the front, from which `project` takes the object to be seen.
FRONT = 0.1
# Deviations of the six values of cameras among renders, by which errors are divided, and the number of them beyond
# which a loss grows linearly.
DEVIATIONS, LARGEST_SQUARED = (0.24, 0.05, 0.5, 0.22, 0.08, 0.08), 4.0


class PictureCameras:
    """Cameras of the prepared pictures of a split, as `models.pixel_alignment.project` takes them.

    Args:
        data: The split, with `NEEDED_COLUMNS` as far as its index has them.
        processor: The image processor, which frames the objects of pictures.
    """

    def __init__(self, data: SparseSDFDataset, processor: Sparse3DImageProcessor):
        self.table = data.table
        self.are_known = set(NEEDED_COLUMNS) <= set(self.table.column_names)
        # The processor puts a margin around the square.
        self.zoom = processor.image_size / (processor.image_size + 2 * processor.padding)

    def get(self, index: int, view: int, quarter_turns: int = 0, mirrored: bool = False) -> Tensor:
        """Returns the camera of view `view` of a mesh, `[6]` float32; NaN if it is not known or not at the front.

        Args:
            index: Row of the mesh in the split.
            view: Number of the picture.
            quarter_turns: Those of the shape, see `Orientation`.
            mirrored: Whether shape and picture are mirrored.
        """
        unknown = torch.full((6,), math.nan)
        if not self.are_known:
            return unknown
        columns = [self.table[name][index].as_py() or [] for name in NEEDED_COLUMNS]
        values = [column[view] for column in columns if view < len(column) and column[view] is not None]
        if len(values) < len(columns) or not all(map(math.isfinite, values)):
            return unknown
        azimuth, elevation, roll, distance, scale, right, down = values
        if abs(math.remainder(azimuth + 90 * quarter_turns, 360)) > FRONT:
            return unknown
        side = -1 if mirrored else 1
        angles = [math.radians(elevation), side * math.radians(roll)]
        return torch.tensor(
            [*angles, math.log(distance), math.log(scale * self.zoom), side * right * self.zoom, down * self.zoom]
        )


def camera_errors(predicted: Tensor, cameras: Tensor) -> Tensor:
    """Returns the errors of predicted cameras `[B, 6]`, `[B]`: squares in deviations, averaged over the six values.

    They are 0 where one of the values of `cameras` `[B, 6]` is NaN. Large ones grow linearly, as by Huber.
    """
    known = cameras.isfinite().all(1)
    difference = (predicted.float() - cameras.nan_to_num()) / predicted.new_tensor(DEVIATIONS, dtype=torch.float32)
    errors = 2 * F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=LARGEST_SQUARED)
    return errors.mean(1) * known
