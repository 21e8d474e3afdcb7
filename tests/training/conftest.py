"""A tiny dataset of real meshes, prepared once for all tests of the training scripts."""

from pathlib import Path

import pytest
import trimesh

from diffusers_sparse3d.training.preparation import command
from tests.training.tiny import DENSE_VAE, SPARSE_VAE


SHAPES = {
    "box": trimesh.creation.box((1.0, 0.6, 0.4)),
    "cylinder": trimesh.creation.cylinder(0.4, 1.2),
    "sphere": trimesh.creation.icosphere(subdivisions=2),
    "annulus": trimesh.creation.annulus(0.3, 0.6, 0.5),
    "capsule": trimesh.creation.capsule(1.0, 0.3),
    "torus": trimesh.creation.torus(0.6, 0.25),
}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six primitives at 32^3, two views each; the capsule and the torus are the validation split."""
    root = tmp_path_factory.mktemp("meshes")
    rows = ["id,mesh,source,category,split,license"]
    for name, mesh in SHAPES.items():
        mesh.export(root / f"{name}.ply")
        rows.append(
            f"{name},{name}.ply,primitives,solids,{'val' if name in ('capsule', 'torus') else 'train'},CC0-1.0"
        )
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    output = root / "data"
    arguments = ["--resolutions", "32", "--num_views", "2", "--image_size", "64", "--num_workers", "0"]
    command.main(["--input", str(root), "--output", str(output), *arguments])
    return output


@pytest.fixture(scope="session")
def common_options(small_data: Path) -> dict:
    """Configuration that all training runs of the tests share."""
    return {
        "data": str(small_data),
        "cpu": True,
        "batch_size": 2,
        "num_workers": 0,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "num_validation_samples": 2,
        "num_pictures": 2,
        "ema_decay": 0.9,
    }


@pytest.fixture(scope="session")
def dense_vae_model() -> dict:
    """Configuration of a tiny DenseVAE."""
    return dict(DENSE_VAE)


@pytest.fixture(scope="session")
def sparse_vae_model() -> dict:
    """Configuration of a tiny SparseVAE."""
    return dict(SPARSE_VAE)
