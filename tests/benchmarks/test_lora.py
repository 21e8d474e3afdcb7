"""The benchmark of LoRA runs, with a tiny pipeline in the place of the small one."""

import functools
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import lora
from benchmarks.lora import main, parse_args, twisted_column
from benchmarks.report import SECTIONS
from diffusers_sparse3d.geometry.metrics import compare_surfaces
from diffusers_sparse3d.training.evaluation import comparison
from tests.pipelines.tiny import tiny_pipeline
from tests.training.conftest import dense_vae_model, small_data, sparse_vae_model  # noqa: F401
from tests.training.test_evaluation import pipeline_at_32


def test_columns_are_closed_and_differ():
    generator = np.random.default_rng(0)
    columns = [twisted_column(generator) for _ in range(4)]
    assert all(column.is_watertight and column.volume > 0 for column in columns)
    assert len({round(column.volume, 6) for column in columns}) == 4


def test_losses_and_shapes_without_and_with_lora(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    # Surfaces of random weights are large, and all the time would go into their alignment.
    monkeypatch.setattr(comparison, "align_meshes", lambda prediction, reference: (prediction, reference, 0.0))
    monkeypatch.setattr(comparison, "compare_surfaces", functools.partial(compare_surfaces, num_samples=300))
    tiny_pipeline(default_num_inference_steps=1).save_pretrained(tmp_path / "model")
    options = [
        "--work",
        str(tmp_path / "work"),
        "--model",
        str(tmp_path / "model"),
        "--components",
        "dense_transformer",
    ]
    options += [
        "--shapes",
        "2",
        "--held-back",
        "1",
        "--views",
        "1",
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--rank",
        "2",
    ]
    options += ["--workers", "0", "--device", "cpu", "--learning-rate", "0.03"]
    options += ["--json", str(tmp_path / "lora.json"), "--picture", str(tmp_path / "lora.png")]
    report = main(parse_args(options))
    assert json.loads((tmp_path / "lora.json").read_text()) == report
    base, tuned = report["rows"]
    assert base["losses"] != tuned["losses"] and len(base["each f1_0.05"]) == 1
    assert base["f1_0.05"] != tuned["f1_0.05"]
    single = Image.open(tmp_path / "work" / "evaluation" / "base.png")
    assert Image.open(tmp_path / "lora.png").width == 2 * single.width
    (sentence,) = SECTIONS["lora"].render(report)
    assert f"F1(0.05) {base['f1_0.05']:.3f} to {tuned['f1_0.05']:.3f}" in sentence
    assert f"dense_transformer {base['losses']['dense_transformer']:.3f} to" in sentence and "on 2 shapes" in sentence


def test_shapes_that_cannot_be_drawn_are_measured(
    tmp_path,
    small_data,  # noqa: F811
    dense_vae_model,  # noqa: F811
    sparse_vae_model,  # noqa: F811
    monkeypatch,
):
    """Without figures of all shapes, two pipelines cannot be compared; without pictures they can."""

    def fail(*args, **options):
        raise MemoryError("too large a mesh")

    pipeline_at_32(dense_vae_model, sparse_vae_model).save_pretrained(tmp_path / "model")
    options = ["--work", str(tmp_path), "--model", str(tmp_path / "model"), "--held-back", "2", "--workers", "0"]
    args = parse_args([*options, "--device", "cpu", "--json", str(tmp_path / "lora.json")])
    monkeypatch.setattr(comparison, "align_meshes", lambda prediction, reference: (prediction, reference, 0.0))
    monkeypatch.setattr(comparison, "compare_surfaces", functools.partial(compare_surfaces, num_samples=300))
    monkeypatch.setattr(comparison, "render_mesh_views", fail)
    assert len(lora.generate(args, "base", small_data)["each f1_0.05"]) == 2
    monkeypatch.setattr(comparison, "compare_surfaces", fail)
    with pytest.raises(RuntimeError, match=r"shapes of 'base' could not all be measured: .*too large a mesh"):
        lora.generate(args, "base", small_data)
