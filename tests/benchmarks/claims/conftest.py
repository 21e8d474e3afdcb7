"""The tiny dataset of the training tests, and options of the commands that fit it."""

import pytest

from tests.training.conftest import small_data  # noqa: F401


@pytest.fixture
def tiny_options(small_data, tmp_path):  # noqa: F811
    """Options of a comparison of trainings, without its models: some steps at 32^3 on the CPU."""
    sizes = ["--resolution", "32", "--batch_size", "2", "--val_shapes", "2", "--num_workers", "0", "--device", "cpu"]
    sizes += ["--num_samples", "500"]
    return ["--data", str(small_data), "--tiny", *sizes, "--json", str(tmp_path / "table.json")]
