"""The Python on pages of the documents that speak of a pipeline runs as it stands there, on a tiny one.

Other pages are run by tests of their own: see `OWN_TESTS`.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trimesh
from diffusers import DiffusionPipeline
from PIL import Image

from tests.app.boxy import boxy_pipeline
from tests.pipelines.tiny import tiny_image


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages whose code another test runs, with its file.
OWN_TESTS = {
    "foreign_models.md": "tests/test_code_of_pages.py",
    "compilation.md": "tests/test_code_of_pages.py",
    "printing.md": "tests/test_code_of_pages.py",
    "conversion.md": "tests/loaders/test_convert.py",
    "data.md": "tests/data/test_page.py",
}
# What a block needs beside the packages of the tests, by a word in it; without that, it is left out.
NEEDS = {
    "enable_model_cpu_offload": torch.cuda.is_available(),
    "gguf": find_spec("gguf") is not None,
    "torchao": find_spec("torchao") is not None,
    "BitsAndBytesConfig": find_spec("bitsandbytes") is not None and torch.cuda.is_available(),
    # It needs several processes; tests/parallel/test_context_parallel.py starts them.
    "init_process_group": False,
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if blocks(page) and page.name not in OWN_TESTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages name: pictures, meshes, the small pipeline, LoRA weights."""
    folder = tmp_path_factory.mktemp("pages")
    pipe = boxy_pipeline()
    pipe.save_pretrained(folder / "checkpoints" / "direct3d-s2-small")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("chair", "front", "side", "back"):
        tiny_image().save(folder / f"{name}.png")
    trimesh.creation.icosphere(2).export(folder / "chair.glb")
    if find_spec("peft") is not None:
        from peft import LoraConfig

        for transformer in (pipe.transformer, pipe.dense_transformer):
            transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
        from peft import get_peft_model_state_dict

        layers = {
            f"{name}_lora_layers": get_peft_model_state_dict(getattr(pipe, name), adapter_name="style")
            for name in ("transformer", "dense_transformer")
        }
        pipe.save_lora_weights(folder / "outputs" / "style", **layers)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_pages(page, folder, monkeypatch):
    """The blocks of a page one after the other, with the names that its text supposes."""
    monkeypatch.chdir(folder)
    names = {
        "DiffusionPipeline": DiffusionPipeline,
        "pipe": boxy_pipeline(),
        "folder": "checkpoints/direct3d-s2-small",
        "photo": Image.open("chair.png"),
    }
    for index, code in enumerate(blocks(page)):
        if all(there for word, there in NEEDS.items() if word in code):
            exec(compile(code, f"{page.name}, block {index}", "exec"), names)


def test_every_page_with_code_is_run():
    assert len(PAGES) >= 6
    for page, test in OWN_TESTS.items():
        assert blocks(DOCS / page) and page in (ROOT / test).read_text(encoding="utf-8")
