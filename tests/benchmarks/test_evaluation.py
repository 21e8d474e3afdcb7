"""The quality of the small pipeline as a benchmark, at a tiny size."""

import json
import sys

import pytest
from PIL import Image

from benchmarks import evaluation
from diffusers_sparse3d.training.evaluation import command, comparison
from tests.training.conftest import dense_vae_model, small_data, sparse_vae_model  # noqa: F401
from tests.training.test_evaluation import pipeline_at_32


@pytest.mark.parametrize("mode", ["generation", "reconstruction"])
def test_figures_of_the_evaluation_with_the_run(tmp_path, small_data, dense_vae_model, sparse_vae_model, mode):  # noqa: F811
    pipeline_at_32(dense_vae_model, sparse_vae_model).save_pretrained(tmp_path / "model")
    file, sheet = tmp_path / "figures.json", tmp_path / "sheets" / "sheet.png"
    options = ["--data", str(small_data), "--model", str(tmp_path / "model"), "--mode", mode, "--every", "2"]
    options += ["--num_workers", "0", "--device", "cpu", "--json", str(file), "--sheet", str(sheet)]
    report = evaluation.main(evaluation.parse_args(options))
    assert json.loads(file.read_text()) == report
    (row,) = report["rows"]
    assert row["id"] == "capsule" and 0 <= row["f1_0.05"] <= 1 and "pictures" not in row
    assert report["summary"]["f1_0.05"]["mean"] == row["f1_0.05"]
    assert report["errors"] == []
    assert report["command"].startswith("python benchmarks/evaluation.py") and report["settings"]["every"] == 2
    assert Image.open(sheet).width > 300


def test_a_sheet_that_cannot_be_written_costs_no_figures(
    tmp_path,
    small_data,  # noqa: F811
    dense_vae_model,  # noqa: F811
    sparse_vae_model,  # noqa: F811
    monkeypatch,
    capsys,
):
    pipeline_at_32(dense_vae_model, sparse_vae_model).save_pretrained(tmp_path / "model")
    file, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    sheet.mkdir()
    options = ["--data", str(small_data), "--model", str(tmp_path / "model"), "--mode", "reconstruction"]
    options += ["--num_workers", "0", "--device", "cpu", "--json", str(file), "--sheet", str(sheet)]
    args = evaluation.parse_args(options)
    with monkeypatch.context() as patch:
        # Told before the model is loaded, which takes long.
        patch.setitem(sys.modules, "embreex", None)
        patch.setattr(command, "load_autoencoder", None)
        with pytest.raises(
            ImportError, match=r"`--sheet` needs embreex: `pip install 'diffusers_sparse3d\[render\]'`"
        ):
            evaluation.main(args)

    def render_none(*args):
        raise MemoryError("too large a picture")

    monkeypatch.setattr(comparison, "render_mesh_views", render_none)
    with pytest.raises(IsADirectoryError):
        evaluation.main(args)
    report = json.loads(file.read_text())
    assert [row["id"] for row in report["rows"]] == ["capsule", "torus"] and report["summary"]["count"] == 2
    assert [(error["id"], error["part"]) for error in report["errors"]] == [
        ("capsule", "pictures"),
        ("torus", "pictures"),
    ]
    assert "2 of 2 meshes lack something" in capsys.readouterr().err
