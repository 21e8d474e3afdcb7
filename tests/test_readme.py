"""The README's Python runs as it stands, on a tiny pipeline in the place of the shipped one."""

import re
import shutil
from pathlib import Path

import pytest
import trimesh

from tests.pipelines.tiny import tiny_pipeline


ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 3
    tiny_pipeline().save_pretrained(tmp_path / "checkpoints" / "direct3d-s2-small")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)

    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)

    assert len(trimesh.load(tmp_path / "sofa.glb", force="mesh").faces) > 0
    assert len(namespace["pipe"].transformer.active_adapters()) == 1
    processors = {type(p).__name__ for p in namespace["pipe"].transformer.attn_processors.values()}
    assert processors == {"SSAAttnProcessor"}
