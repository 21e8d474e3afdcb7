"""The quality of the small pipeline as a benchmark, at a tiny size."""

import json

import pytest
from PIL import Image

from benchmarks import evaluation
from tests.training.conftest import dense_vae_model, small_data, sparse_vae_model  # noqa: F401
from tests.training.test_evaluation import pipeline_at_32


@pytest.mark.parametrize("mode", ["generation", "reconstruction"])
def test_figures_of_the_evaluation_with_the_run(tmp_path, small_data, dense_vae_model, sparse_vae_model, mode):  # noqa: F811
    pipeline_at_32(dense_vae_model, sparse_vae_model).save_pretrained(tmp_path / "model")
    file, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    options = ["--data", str(small_data), "--model", str(tmp_path / "model"), "--mode", mode, "--every", "2"]
    options += ["--num_workers", "0", "--device", "cpu", "--json", str(file), "--sheet", str(sheet)]
    report = evaluation.main(evaluation.parse_args(options))
    assert json.loads(file.read_text()) == report
    (row,) = report["rows"]
    assert row["id"] == "capsule" and 0 <= row["f1_0.05"] <= 1 and "pictures" not in row
    assert report["summary"]["f1_0.05"]["mean"] == row["f1_0.05"]
    assert report["command"].startswith("python benchmarks/evaluation.py") and report["settings"]["every"] == 2
    assert Image.open(sheet).width > 300
