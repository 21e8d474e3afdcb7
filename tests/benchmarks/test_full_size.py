"""The benchmark of the whole pipeline runs, at a tiny size."""

import json

import trimesh

from benchmarks.full_size import main, parse_args
from benchmarks.report import SECTIONS


def test_every_step_is_in_the_report(tmp_path):
    # Little surface: the models that work on its samples take most of the time.
    trimesh.creation.cylinder(0.1, 1).export(tmp_path / "rod.ply")
    arguments = ["--work", str(tmp_path), "--mesh", str(tmp_path / "rod.ply"), "--tiny", "--dtype", "float32"]
    steps = ["--dense_steps", "1", "--steps", "1", "--steps_1024", "1", "--device", "cpu"]
    main(parse_args([*arguments, *steps, "--json", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["step"] for row in report["steps"]] == [
        "image tokens",
        "dense: denoising",
        "dense: decoding",
        "sparse: denoising",
        "vae.decode",
        "refiner.refine",
        "sparse: SDF to mesh",
        "sparse_1024: cells",
        "sparse_1024: denoising",
        "vae_1024.decode",
        "refiner_1024.refine",
        "sparse_1024: SDF to mesh",
    ]
    assert all(0 < row["seconds"] <= report["total"] for row in report["steps"])
    lines = SECTIONS["full_size"].render(report)
    short = [row["seconds"] < 0.01 * report["total"] for row in report["steps"]]
    assert len(lines) == 2 + short.count(False) + any(short) + 1
    assert not any(short) or lines[-2].startswith(f"| {sum(short)} short steps | ")
    assert f"| all steps | {report['total']:,.3f} |" in lines[-1]
