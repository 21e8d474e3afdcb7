"""The documentation site builds without a warning, asks no other server for anything, and has what it should."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is missing")
    import mkdocs.commands.build
    import mkdocs.config

    folder = tmp_path_factory.mktemp("site")
    config = mkdocs.config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs.commands.build.build(config)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_pages(site):
    """Every page of docs/ is there, with the docstrings of the reference."""
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages = {path.with_name("index.html") if path.name == "README.html" else path for path in pages}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert pages <= built
    reference = (site / "reference" / "pipeline.html").read_text(encoding="utf-8")
    assert "dense_num_inference_steps" in reference and "Denoising steps of the dense stage" in reference
    assert not re.search(r"\[(<code>|`)~?\w", reference) and "Dinov2WithRegistersModel" in reference
    assert not list(site.rglob("*.py"))


def test_links_outside_of_the_documents_lead_to_the_repository(site):
    page = (site / "start.html").read_text(encoding="utf-8")
    assert "/blob/main/checkpoints/direct3d-s2-small/README.md" in page
    for path in site.rglob("*.html"):
        assert not re.search(r'href="[./]*(diffusers_sparse3d|checkpoints|benchmarks)/', path.read_text("utf-8")), path


def test_nothing_is_loaded_from_another_server(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)', path.read_text(encoding="utf-8"))
        styles = re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(https?:[^"]*)', path.read_text(encoding="utf-8"))
        assert loaded + styles == [], path
