"""The comparison of autoencoders of one sparse format, of mixed formats, and of vector sets, at a tiny size."""

import json

import numpy as np
import pytest
import torch
import trimesh

from benchmarks.claims import formats
from benchmarks.claims.surface_points import draw, surface_points
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks


def count(name):
    return sum(parameter.numel() for parameter in formats.make_model(name).parameters())


def test_the_rivals_have_as_many_parameters():
    for name in formats.MODELS[1:]:
        assert count(name) == pytest.approx(count("sparse"), rel=0.1)


def test_points_are_on_the_surface_with_its_normals():
    """Of a sphere, whose distance and normals are known."""
    resolution = 64
    blocks = mesh_to_sdf_blocks(trimesh.creation.icosphere(5, 0.7), resolution)
    coords = torch.nn.functional.pad(blocks.coords, (1, 0), value=1)
    points = surface_points(blocks.values.flatten(1), coords, resolution)
    places = points.places * 2 / (resolution - 1) - 1
    radius = places.norm(dim=1)
    np.testing.assert_allclose(radius, 0.95, atol=3e-3)
    cosine = (points.normals * places / radius[:, None]).sum(1)
    assert cosine.min() > 0.98 and cosine.mean() > 0.999
    assert (points.samples == 1).all() and len(points.rows.unique()) > 0.5 * len(coords)
    # Each point is near the block that it is counted to.
    outside = (points.places - 8 * coords[points.rows, 1:] - 3.5).abs().amax(1)
    assert outside.max() < 4.6


def test_rows_are_drawn_of_each_sample():
    samples = torch.tensor([1, 0, 1, 0, 0, 1, 2])
    rows = draw(samples, 3, 3)
    for sample in range(3):
        assert (samples[rows[sample]] == sample).all()
    assert sorted(rows[0].tolist()) == [1, 3, 4] and rows[2].tolist() == [6, 6, 6]
    assert len({tuple(draw(samples, 3, 3)[1].tolist()) for _ in range(20)}) > 1


def test_all_formats_train_and_stand_in_one_table(tiny_options, tmp_path, monkeypatch):
    for name in ("POINTS", "SET_POINTS", "QUERIES"):
        monkeypatch.setattr(formats, name, 256)
    options = [*tiny_options, "--minutes", "0.01"]
    report = formats.main(formats.parse_args([*options, "--seeds", "0", "--plot", str(tmp_path / "curves.png")]))
    assert [(row["model"], row["seed"]) for row in report["rows"]] == [(name, 0) for name in formats.MODELS]
    for row in report["rows"]:
        last = row["points"][-1]
        assert row["steps"] >= 10 and last["share"] == 1 and last["num_shapes"] == 2
        minutes = [point["minutes"] for point in row["points"]]
        assert minutes == sorted(minutes) and minutes[-1] >= 0.01
        assert 0 <= last["f1_0.01"] <= 1 and last["losses"]["loss"] > 0
        losses = [loss for _, loss in row["curve"]]
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert list(report["summary"]) == list(formats.MODELS)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "table.json").read_text())["command"].startswith(
        "python -m benchmarks.claims.formats"
    )

    # Rows that are there stay; a further seed is added; other settings are refused.
    formats.main(formats.parse_args([*options, "--seeds", "0", "1", "--models", "sparse"]))
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["rows"][:3] == json.loads(json.dumps(report["rows"])) and len(table["rows"]) == 4
    assert table["summary"]["sparse"]["seeds"] == 2 and table["summary"]["sparse"]["loss_spread"] > 0

    # Rows of other runs, joined in the file, are summarised too.
    table["rows"][3]["seed"], table["rows"][3]["parameters"] = 7, 5
    (tmp_path / "table.json").write_text(json.dumps({**table, "summary": {}}))
    formats.main(formats.parse_args([*options, "--seeds", "0"]))
    joined = json.loads((tmp_path / "table.json").read_text())
    assert joined["rows"] == table["rows"] and joined["summary"] == table["summary"]
    with pytest.raises(ValueError, match="`--json`"):
        formats.main(formats.parse_args([*tiny_options, "--minutes", "0.02", "--seeds", "0"]))


@pytest.mark.parametrize("name", formats.MODELS)
def test_reconstructions_depend_on_what_goes_in(name, small_data):
    """On the shape; and SparseVAE does not see the samples off the band, which its loss compares with."""
    torch.manual_seed(0)
    blocks = mesh_to_sdf_blocks(trimesh.creation.box((1, 0.6, 0.4)), 32)
    batch = formats.pack(
        [{"coords": blocks.coords, "values": blocks.values.flatten(1), "sharp": blocks.sharp.flatten(1)}]
    )
    batch["resolution"] = torch.tensor([32])
    config = formats.build_config(formats.SparseVAEConfig, {"data": "", "output_dir": "", "max_train_steps": 1})
    task = formats.TASKS[name](formats.make_model(name, tiny=True).eval(), config)

    def decoded(values):
        torch.manual_seed(1)
        coords, target, is_input, _ = formats.expand_blocks({**batch, "values": values})
        with torch.no_grad():
            return task.reconstruct({**batch, "values": values}, coords, target, is_input, training=False)[1]

    values = batch["values"]
    far = torch.where(values.abs() < 1, values, -values)
    near = torch.where(values.abs() < 0.45, -values, values)
    expected = decoded(values)
    assert expected.shape == (values.numel(), 1) and expected.isfinite().all()
    if name == "sparse":
        torch.testing.assert_close(decoded(far), expected)
    assert not torch.allclose(decoded(near), expected, atol=1e-5)
