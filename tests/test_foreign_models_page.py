"""The code on the page about models of other packages runs as it stands there."""

import re
from pathlib import Path

import torch


PAGE = Path(__file__).parents[1] / "docs" / "foreign_models.md"


def test_code_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    for code in blocks:
        names: dict = {}
        exec(compile(code, str(PAGE), "exec"), names)
        reloaded = names["model"](torch.zeros_like(names["output"]), names["coords"])
        assert reloaded.shape == names["output"].shape
