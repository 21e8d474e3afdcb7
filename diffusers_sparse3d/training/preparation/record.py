"""One mesh to its record: SDFs at every resolution, sharp-edge flags, occupancy, pictures and statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch

from ...data.records import Record, mesh_columns, mesh_record
from ...geometry.mesh import load_mesh
from ...geometry.render import UP_ROTATIONS
from ...geometry.sdf import mesh_to_sdf_blocks
from .index import COLUMNS, ODD_ROW, MeshEntry
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
    entry: MeshEntry, settings: Settings, images_dir: Path | None = None, device: torch.device | str = "cpu"
) -> Record:
    """Returns the record of a mesh, which depends on the files of the mesh, its row and the settings alone.

    The same input gives the same bytes, in any process and order and with any number of threads, on processors of one
    kind.

    Args:
        entry: The mesh.
        settings: What the record depends on beside it.
        images_dir: Folder of pictures, ID/0.webp, ..., to take instead of renders.
        device: Device that computes the distances.

    Raises:
        PreparationError: if the mesh or its pictures cannot be used; its attribute `cause` names the step.
    """
    if entry.problem:
        raise PreparationError(ODD_ROW, entry.problem)
    with _step("reading"):
        mesh = load_mesh(entry.mesh)
        mesh.vertices = mesh.vertices @ UP_ROTATIONS[entry.up_axis].T
        size = entry.mesh.stat().st_size
    with _step("pictures"):
        pictures = make_pictures(entry, settings) if images_dir is None else read_pictures(entry, images_dir)
    fields = []
    for resolution in settings.resolutions:
        with _step("distances"):
            fields.append(mesh_to_sdf_blocks(mesh, resolution, progress=False, device=device))
    return mesh_record(
        entry.id,
        fields,
        pictures.files,
        num_given=pictures.given,
        azimuths=pictures.azimuths,
        faces=len(mesh.faces),
        mesh_bytes=size,
        **{column: getattr(entry, column) for column in COLUMNS},
    )


def record_columns(settings: Settings) -> pa.Schema:
    """Returns the columns of records: those of every dataset of meshes, and statistics of the mesh.

    `faces` are the triangles with an area, `mesh_bytes` the size of its file.
    """
    return pa.schema([*mesh_columns(settings.resolutions), ("faces", pa.int64()), ("mesh_bytes", pa.int64())])


@contextmanager
def _step(cause: str) -> Iterator[None]:
    """Gives errors of a `with` block their cause."""
    try:
        yield
    except Exception as error:
        raise PreparationError(cause, f"{type(error).__name__}: {error}") from error
