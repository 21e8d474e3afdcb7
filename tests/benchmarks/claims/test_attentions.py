"""The comparison of attentions in the sparse stage, at a tiny size; and sparse attention along one dimension."""

import itertools

import pytest
import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from benchmarks.claims import attentions
from benchmarks.claims.line_attention import LineAttnProcessor, line_coords
from diffusers_sparse3d import SparseVAE
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.training.tiny import SPARSE_VAE


SIZES = {"sample_size": 16, "in_channels": 4, "cross_attention_dim": 8, "sparse_conditioning": False}


def voxels(counts=(70, 150), size=16):
    """Distinct voxels of several samples, in no order."""
    rows = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(size**3)[:count]
        xyz = torch.stack([cells // size**2, cells // size % size, cells % size], dim=1)
        rows.append(torch.nn.functional.pad(xyz, (1, 0), value=sample))
    coords = torch.cat(rows).int()
    return coords[torch.randperm(len(coords))]


@pytest.mark.parametrize(("offset", "edge"), [(0, 2), (0, 8), (32, 4), (256, 8)])
def test_cubes_on_the_line_are_runs_of_tokens(offset, edge):
    coords = voxels()
    line = line_coords(coords, offset, spacing=4)
    assert line.dtype == torch.int32 and torch.equal(line[:, 0], coords[:, 0])
    for sample in range(2):
        rows = sorted(
            (row for row in range(len(coords)) if coords[row, 0] == sample), key=lambda r: coords[r].tolist()
        )
        cubes = [tuple((line[row, 1:] // edge).tolist()) for row in rows]
        runs = [len(list(run)) for _, run in itertools.groupby(cubes)]
        # A cube is one run, as many tokens long as it has places; the first one is cut off by the offset.
        assert len(runs) == len(set(cubes))
        length = edge**3 // 4
        first = length - offset // 4 % length
        assert runs[0] == min(first, len(rows)) and all(run == length for run in runs[1:-1])
    assert line.unique(dim=0).shape == line.shape


def test_windows_of_odd_blocks_are_shifted_along_the_line():
    transformer = attentions.make_transformer("nsa_1d", **attentions.TINY_MODEL, **SIZES)
    processors = [block.attn1.processor for block in transformer.transformer_blocks]
    assert [type(processor) for processor in processors] == [LineAttnProcessor] * 2
    assert [processor.offset for processor in processors] == [0, 256]
    assert all(block.attn1.window_shift == 0 for block in transformer.transformer_blocks)


def test_attention_along_the_line_is_that_of_tokens_in_space_that_lie_so():
    """The same numbers as SSA for tokens whose coordinates are those of the line, wherever they are in space."""
    ssa, line = (attentions.make_transformer(name, **attentions.TINY_MODEL, **SIZES) for name in ("ssa", "nsa_1d"))
    line.load_state_dict(ssa.state_dict())
    coords = voxels()
    own, spatial = line.transformer_blocks[0].attn1, ssa.transformer_blocks[0].attn1
    tokens = torch.randn(len(coords), own.to_q.in_features)
    found = own(tokens, coords)
    torch.testing.assert_close(found, spatial(tokens, line_coords(coords)))
    assert not torch.allclose(found, spatial(tokens, coords), atol=1e-3)
    cache = CoordinateCache(coords)
    own.plan(tokens, cache)
    torch.testing.assert_close(own(tokens, cache=cache), found)


def test_each_attention_is_another_one():
    coords, velocities = voxels(), {}
    hidden, context, timestep = torch.randn(len(coords), 4), torch.randn(2, 3, 8), torch.tensor([300.0, 700.0])
    for name in attentions.MODELS:
        torch.manual_seed(0)
        transformer = attentions.make_transformer(name, **attentions.TINY_MODEL, **SIZES)
        # Freshly initialised gates and the last layer are zero.
        for parameter in transformer.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        velocities[name] = transformer(hidden, coords, timestep, context).sample
    for first, second in itertools.combinations(velocities.values(), 2):
        assert (first - second).abs().max() > 1e-3


def test_attentions_train_and_stand_in_one_table(tiny_options, tmp_path, sparse_vae_folder, encoder_folder):
    folders = ["--vae", sparse_vae_folder, "--image_encoder", encoder_folder, "--cache_dir", str(tmp_path / "images")]
    options = [*tiny_options, *folders, "--seeds", "0", "--minutes", "0.002", "--plot", str(tmp_path / "curves.png")]
    report = attentions.main(attentions.parse_args([*options, "--models", "nsa_1d", "full", "--val_shapes", "1"]))
    line, full = report["rows"]
    assert (line["model"], full["model"]) == ("nsa_1d", "full") and line["parameters"] > full["parameters"]
    losses = [row["points"][-1]["losses"]["loss"] for row in (line, full)]
    assert losses[0] != losses[1]
    assert all(0 < row["points"][-1]["normal_error"] <= 90 for row in report["rows"])
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.fixture
def sparse_vae_folder(tmp_path):
    torch.manual_seed(0)
    vae = SparseVAE(**SPARSE_VAE)
    # Distances of both signs.
    vae.decoder.conv_out.weight.data.mul_(20)
    vae.decoder.conv_out.bias.data.zero_()
    vae.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.fixture
def encoder_folder(tmp_path):
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")
