"""One shape to its record: SDFs at every resolution, sharp-edge flags, occupancy, pictures and statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch

from ...data.records import BLOCK_SIZE, Record, mesh_columns, mesh_record, occupancy_record
from ...geometry.outer_points import OuterPoints, outer_cells
from ...geometry.sdf import mesh_to_sdf_blocks
from .augmentation import deformation_of
from .deformation import Deformation
from .index import COLUMNS, ODD_ROW, MeshEntry
from .mesh_file import MeshFile
from .pictures import make_pictures, read_pictures
from .settings import Settings


class PreparationError(Exception):
    """A mesh cannot be prepared.

    Attributes:
        cause: The step that failed, by which failures are counted.
    """

    def __init__(self, cause: str, reason: str):
        super().__init__(reason)
        self.cause = cause


def make_record(
    entry: MeshEntry,
    settings: Settings,
    images_dir: Path | None = None,
    device: torch.device | str = "cpu",
    file: MeshFile | None = None,
) -> Record:
    """Returns the record of a mesh or of a shape of it, which depends on its files, its row and the settings alone.

    The same input gives the same bytes, in any process and order and with any number of threads, on processors of one
    kind.

    Args:
        entry: The mesh, or the shape.
        settings: What the record depends on beside it.
        images_dir: Folder of pictures, ID/0.webp, ..., to take instead of renders.
        device: Device that computes the distances, and the pictures of the rasteriser.
        file: The file of the mesh, if other shapes of it are made, too.

    Raises:
        PreparationError: if the mesh or its pictures cannot be used; its attribute `cause` names the step.
    """
    if entry.problem:
        raise PreparationError(ODD_ROW, entry.problem)
    file = file or MeshFile(entry)
    with _step("reading"):
        mesh, size = file.mesh, file.size
        deformation = deformation_of(entry, settings)
    with _step("pictures"):
        if images_dir is None:
            pictures = make_pictures(entry, settings, device, file, deformation)
        else:
            pictures = read_pictures(entry, images_dir)
    columns = {
        "num_given": pictures.given,
        **pictures.camera_columns(),
        "faces": len(mesh.faces),
        "mesh_bytes": size,
        **{column: getattr(entry, column) for column in COLUMNS},
    }
    with _step("distances"):
        if settings.dense_only:
            resolution = min(settings.resolutions)
            cells = outer_cells(_moved(file.outer_points(resolution, device), file, deformation), resolution)
            return occupancy_record(entry.id, cells, resolution // BLOCK_SIZE, pictures.files, **columns)
        if deformation is not None:
            mesh = deformation.mesh(mesh)
        fields = [
            mesh_to_sdf_blocks(mesh, resolution, progress=False, device=device) for resolution in settings.resolutions
        ]
    return mesh_record(entry.id, fields, pictures.files, **columns)


def _moved(outer: OuterPoints, file: MeshFile, deformation: Deformation | None) -> OuterPoints:
    """The points of the outer surface of a mesh, on one of its shapes."""
    if deformation is None:
        return outer
    points = deformation.points_like(outer.points.cpu().numpy(), file.normalized)
    return outer._replace(points=torch.from_numpy(points).to(outer.points.device))


def record_columns(settings: Settings) -> pa.Schema:
    """Returns the columns of records: those of every dataset of meshes, and statistics of the mesh.

    `faces` are the triangles with an area, `mesh_bytes` the size of its file.
    """
    return pa.schema([*mesh_columns(settings.sdf_resolutions), ("faces", pa.int64()), ("mesh_bytes", pa.int64())])


@contextmanager
def _step(cause: str) -> Iterator[None]:
    """Gives errors of a `with` block their cause."""
    try:
        yield
    except Exception as error:
        raise PreparationError(cause, f"{type(error).__name__}: {error}") from error
