"""The notebooks run from top to bottom, at tiny size: a test puts its own values after the cell of parameters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh

from tests.app.boxy import boxy_pipeline


NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TINY = {
    "generate": {"steps": {"num_inference_steps": 1}},
    "fine_tune": {
        "options": ["--max_train_steps", "1", "--num_views", "1", "--rank", "2", "--preparation_workers", "0",
                    "--dataloader_num_workers", "0", "--train_batch_size", "1", "--num_pictures", "1", "--cpu"],
        "steps": {"num_inference_steps": 1},
    },
    "attention": {"num_tokens": 200},
}  # fmt: skip


def run_notebook(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The names that are left after all cells of a notebook."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        # Notebooks are kept without what they printed.
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{name}.ipynb, {cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert set(parameters) <= set(names)
                names.update(parameters)
    return names


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder beside a tiny model and the examples."""
    boxy_pipeline().save_pretrained(tmp_path / "checkpoints" / "direct3d-s2-small")
    shutil.copytree(NOTEBOOKS.parent / "examples", tmp_path / "examples")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path / "notebooks"


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(TINY)


def test_generate(work):
    names = run_notebook("generate", TINY["generate"])
    assert len(trimesh.load(work / "object.glb", force="mesh").faces) == len(names["mesh"].faces)
    assert len(names["meshes"]) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fine_tune(work):
    pytest.importorskip("peft")
    names = run_notebook("fine_tune", TINY["fine_tune"])
    assert (
        len(list((work / "meshes").glob("*.ply"))) == 4
        and (work / "style" / "pytorch_lora_weights.safetensors").exists()
    )
    assert names["pipe"].get_active_adapters()


def test_attention(work):
    outputs = run_notebook("attention", TINY["attention"])["outputs"]
    assert set(outputs) == {"ssa", "full", "window"}
    assert all(torch.isfinite(output).all() for output in outputs.values())
    assert not torch.allclose(outputs["ssa"], outputs["full"])
