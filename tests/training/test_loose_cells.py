"""Shapes in cells that are not exactly those of their surface: which are added and lost, and on which side."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_sparse3d import SparseVAE
from diffusers_sparse3d.geometry.sdf import SDFBlocks
from diffusers_sparse3d.training.batches import BlockDataset, expand_blocks, pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.dit_configuration import DiTConfig
from diffusers_sparse3d.training.latents import cache_latents
from diffusers_sparse3d.training.loose_cells import encoder_rows, loosen_cells
from diffusers_sparse3d.training.sampler import SampleKey
from diffusers_sparse3d.training.sparse_vae import SparseVAEConfig


CELLS, SIZE, TAU = 16, 4, 1.0


def distances(places):
    """Signed distances over tau to a box of 44 voxels, whose walls are in the middle of cells."""
    return ((places - 31.5).float().abs().amax(dim=-1) - 22) / TAU


@pytest.fixture(scope="module")
def box():
    cells = torch.cartesian_prod(*[torch.arange(CELLS)] * 3)
    local = torch.cartesian_prod(*[torch.arange(SIZE)] * 3).view(SIZE, SIZE, SIZE, 3)
    values = distances(SIZE * cells[:, None, None, None] + local).clamp(-1, 1)
    band = (values.abs() < 1).flatten(1).any(1)
    return SDFBlocks(cells[band].int(), values[band], values[band].abs() < 0.2, CELLS * SIZE)


def as_set(coords):
    return set(map(tuple, coords.tolist()))


def test_cells_are_added_beside_the_surface_and_are_on_their_side_of_it(box):
    own, inside, outside, lost, largest = as_set(box.coords), 0, 0, 0, 0.0
    steps = [np.subtract(step, 1) for step in np.ndindex(3, 3, 3)]
    around = {tuple(np.add(cell, step)) for cell in own for step in steps} - own
    rows = {tuple(cell): row for row, cell in enumerate(box.coords.tolist())}
    for seed in range(40):
        loose = loosen_cells(box, 0.5, seed)
        keys = loose.coords.long() @ torch.tensor([CELLS**2, CELLS, 1])
        assert (keys.diff() > 0).all()
        added = as_set(loose.coords) - own
        assert added <= around
        largest = max(largest, len(added) / len(around))
        lost = max(lost, len(own - as_set(loose.coords)))
        for cell, values, sharp in zip(loose.coords, loose.values, loose.sharp):
            if tuple(cell.tolist()) in own:
                row = rows[tuple(cell.tolist())]
                assert torch.equal(values, box.values[row]) and torch.equal(sharp, box.sharp[row])
                continue
            side = distances(SIZE * cell + (SIZE - 1) / 2).sign()
            assert (values == side).all() and not sharp.any()
            inside, outside = inside + (side < 0), outside + (side > 0)
    assert inside > 100 and outside > 100
    assert 0.35 < largest <= 0.5
    assert 0 < lost <= 0.05 * len(own) + 1


def test_cells_are_added_and_lost_in_blobs(box):
    """Most added cells have another one beside them, which few of as many scattered ones would have."""
    loose = next(
        made for seed in range(40) if len((made := loosen_cells(box, 0.12, seed)).coords) > len(box.coords) + 20
    )
    added = as_set(loose.coords) - as_set(box.coords)
    together = sum(any(tuple(np.add(cell, step)) in added for step in np.eye(3, dtype=int)) for cell in added)
    assert together > 0.5 * len(added)


def test_a_seed_is_a_shape_and_some_shapes_stay_as_they_are(box):
    made = [loosen_cells(box, 0.5, seed) for seed in range(100)]
    exact = sum(blocks is box for blocks in made)
    assert 15 <= exact <= 35
    assert len({len(blocks.coords) for blocks in made}) > 40
    again = loosen_cells(box, 0.5, 7)
    assert torch.equal(again.coords, made[7].coords) and torch.equal(again.values, made[7].values)
    assert loosen_cells(box, 0.0, 7) is box
    with pytest.raises(ValueError, match="`share` must be a finite number from 0 to 1"):
        loosen_cells(box, 1.5, 0)


def test_the_encoder_sees_the_corners_of_blocks_that_the_surface_does_not_cross():
    values = torch.ones(2, 4, 4, 4)
    values[0, 1, 2, 3] = 0.5
    rows = encoder_rows(values)
    assert rows[0].nonzero().tolist() == [[1, 2, 3]]
    assert rows[1].nonzero().tolist() == [[x, y, z] for x in (0, 3) for y in (0, 3) for z in (0, 3)]


def test_loosened_shapes_are_encoded_with_all_their_cells(small_data, sparse_vae_model):
    data = SparseSDFDataset(small_data, "train", 32)
    exact, loose = BlockDataset(data), BlockDataset(data, loose_cells=1.0)
    keys = [SampleKey(0, 32, seed, 0.5) for seed in range(8)]
    items = [loose[key] for key in keys]
    assert len({len(item["coords"]) for item in items}) > 2
    assert max(len(item["coords"]) for item in items) > len(exact[0, 32]["coords"])
    batch = pack(items)
    coords, target, is_input, _ = expand_blocks(batch)
    vae = SparseVAE(**sparse_vae_model)
    with torch.no_grad():
        encoded = vae.encode(target[is_input], coords[is_input])
    assert torch.equal(encoded.coords, batch["coords"])


def test_latents_of_loosened_shapes_are_others(small_data, sparse_vae_model, tmp_path):
    data = SparseSDFDataset(small_data, "train", 32)
    vae = SparseVAE(**sparse_vae_model)
    caches = [
        cache_latents(vae, data, tmp_path, Accelerator(cpu=True), 2, 0, loose_cells=share) for share in (0.0, 1.0, 1.0)
    ]
    exact, loose, again = caches
    assert exact.sizes.tolist() == data.num_blocks(32).tolist()
    assert loose.sizes.tolist() == again.sizes.tolist() != exact.sizes.tolist()


@pytest.mark.parametrize(("config_class", "more"), [(SparseVAEConfig, {}), (DiTConfig, {"stage": "sparse"})])
def test_shares_are_checked(config_class, more):
    options = {"data": "", "output_dir": "x", "max_train_steps": 1, **more}
    if config_class is DiTConfig:
        options |= {"vae": "x", "image_encoder": "x"}
    assert build_config(config_class, {**options, "loose_cells": 0.5}).loose_cells == 0.5
    with pytest.raises(ValueError, match="`loose_cells` must be a finite number from 0 to 1"):
        build_config(config_class, {**options, "loose_cells": 2})
    if config_class is DiTConfig:
        with pytest.raises(ValueError, match="`loose_cells` must be 0 in the dense stage"):
            build_config(config_class, {**options, "stage": "dense", "loose_cells": 0.5})
