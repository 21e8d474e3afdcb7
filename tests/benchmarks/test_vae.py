"""The benchmark of the SparseVAE runs, at a tiny size."""

import json
import math

import torch
import trimesh

from benchmarks.report import SECTIONS
from benchmarks.vae import STEPS, Shape, main, parse_args
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks
from diffusers_sparse3d.ops.coordinates import subdivide_coords


def test_every_step_is_in_the_report(tmp_path):
    main(parse_args(["--tiny", "--device", "cpu", "--json", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["step"]: row for row in report["rows"]}
    assert tuple(rows) == STEPS
    assert all(row["seconds"] > 0 and row["decoded_samples"] == 512 * row["latents"] for row in rows.values())
    # The tiled decoder rounds to bfloat16 elsewhere.
    assert rows["decode, tiled"]["difference"] < 0.05
    assert rows["SDF to mesh"]["faces"] > 1000
    losses = [rows[step]["loss"] for step in STEPS[-2:]]
    assert all(0 < loss < math.inf for loss in losses)
    assert report["command"] == "python benchmarks/vae.py --tiny --device cpu --json report.json"
    header, _, row = SECTIONS["vae"].render(report)
    assert header.count("|") == row.count("|") and f"{rows['training step']['seconds']:.3f} / -" in row


def test_targets_are_in_the_order_of_the_decoder():
    mesh = trimesh.creation.torus(0.7, 0.2, major_sections=256, minor_sections=128)
    shape = Shape(None, 64, "cpu")
    blocks = mesh_to_sdf_blocks(mesh, 64)
    coords = shape.latent_coords
    for _ in range(3):
        coords = subdivide_coords(coords)
    block = (blocks.coords.long() * coords.new_tensor([64, 8, 1])).sum(1)
    row = torch.searchsorted(block, (coords[:, 1:].long() // 8 * coords.new_tensor([64, 8, 1])).sum(1))
    x, y, z = (coords[:, 1:].long() % 8).unbind(1)
    assert (blocks.values[row, x, y, z] == shape.target[:, 0]).all()
