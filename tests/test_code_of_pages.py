"""The code on some pages of the documents runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import torch


DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str) -> dict[str, Any]:
    """The names that are left after all Python on a page."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    for code in blocks:
        exec(compile(code, name, "exec"), names)
    return names


def test_foreign_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("foreign_models.md")
    assert names["output"].isfinite().all()
    assert names["x"].feats.shape == (len(names["coords"]), 4) and names["feats"].shape[1] == 16


def test_compilation():
    names = run_page("compilation.md")
    model, inputs = names["model"], names["inputs"]
    torch.nn.init.normal_(model.proj_out.weight)
    expected = model(*inputs).sample
    torch.testing.assert_close(names["compiled"](*inputs, cache=names["cache"]).sample, expected)
    assert names["program"].module()(inputs[0], *inputs[2:]).shape == expected.shape


def test_printing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("printing.md")
    assert names["report"].volume > 30 and (tmp_path / "ball.stl").exists()
