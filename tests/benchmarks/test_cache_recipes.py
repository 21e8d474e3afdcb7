"""The benchmark of recipes runs, on a pipeline of tiny models."""

import json

import pytest
import trimesh

from benchmarks import cache_recipes
from tests.pipelines.tiny import tiny_image, tiny_pipeline


def test_recipes_are_compared_with_the_exact_run_of_their_seed(tmp_path, monkeypatch):
    settings = {"default_dense_num_inference_steps": 4, "default_num_inference_steps": 6}
    monkeypatch.setattr(cache_recipes, "load", lambda args: tiny_pipeline(occupancy_threshold=0.65, **settings))
    monkeypatch.setattr(cache_recipes, "compare", lambda mesh, exact: {"f1": len(exact.faces), "chamfer": 1.0})
    tiny_image().save(tmp_path / "disc.png")
    arguments = ["--images", str(tmp_path / "disc.png"), "--seeds", "3", "4", "--device", "cpu"]
    arguments += ["--recipes", "half the steps", "magnitudes", "faster"]
    cache_recipes.main(cache_recipes.parse_args([*arguments, "--json", str(tmp_path / "report.json")]))
    report = json.loads((tmp_path / "report.json").read_text())
    exact, *others = report["rows"]
    assert [row["recipe"] for row in others] == ["half the steps", "magnitudes", "faster"]
    assert "f1" not in exact and [run["seed"] for run in exact["runs"]] == [3, 4]
    faces = [run["f1"] for run in others[0]["runs"]]
    assert faces[0] != faces[1]
    for row in others:
        assert 0 < row["denoising_seconds"] < row["seconds"]
        assert [run["f1"] for run in row["runs"]] == faces and row["f1"] == sum(faces) / 2
    assert report["other_seed"]["f1"] == faces[0]


@pytest.mark.parametrize("given", [None, (50, 30)], ids=["checkpoint", "given"])
def test_steps_are_shares_of_those_of_the_exact_run(given):
    pipe = tiny_pipeline(default_dense_num_inference_steps=12, default_num_inference_steps=2)
    bench = cache_recipes.Bench(pipe, "cpu", given)
    steps = {
        name: tuple(bench.num_steps(stage, cache_recipes.RECIPES[name]) for stage in ("dense", "sparse"))
        for name in ("exact", "half the steps", "few steps")
    }
    expected = {"exact": (12, 2), "half the steps": (6, 1), "few steps": (3, 1)}
    if given:
        expected = {"exact": (50, 30), "half the steps": (25, 15), "few steps": (12, 4)}
    assert steps == expected


def test_comparison():
    inner, outer = (trimesh.creation.icosphere(subdivisions=3, radius=radius) for radius in (0.5, 0.53))
    compared = cache_recipes.compare(inner, outer)
    assert compared["f1"] == 1.0 and compared["chamfer"] == pytest.approx(0.03, rel=0.05)


def test_recipes_have_names():
    with pytest.raises(SystemExit):
        cache_recipes.parse_args(["--recipes", "another"])
