"""The count of training steps, for few cells."""

import pytest
import torch

import step_floors


@pytest.mark.parametrize(("model", "samples"), [("dit", 2), ("vae", 1)])
def test_a_row(model, samples):
    row = step_floors.count(model, 300, 7)
    assert (row["samples"], row["tokens"], row["checkpointing"]) == (samples, 300, True)
    # Nearly all work is in the blocks, which checkpointing calls again.
    assert 3.9 * row["forward"] < row["step"] < 4 * row["forward"]
    # The cells that are nearest to the surface are wholly in the narrow band.
    assert row.get("voxels", 512 * 300) == 512 * 300


def test_samples_of_a_batch_are_apart():
    cache = step_floors.batch(torch.tensor([[1, 2, 3], [4, 5, 6]]), 2)
    assert cache.coords.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6], [1, 1, 2, 3], [1, 4, 5, 6]]
    assert cache.seqlens.tolist() == [2, 2]
