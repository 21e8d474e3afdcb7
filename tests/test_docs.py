"""Links of the documents lead to files and headings that exist, and so do the files that they name."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(
        path
        for name in ("docs", "examples", "checkpoints", "comfyui", "notebooks", "diffusers_sparse3d")
        for path in (ROOT / name).rglob("*.md")
    ),
]
# Entries of the log name files as they were.
CURRENT = [path for path in PAGES if path.parent != ROOT / "docs" / "log"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Paths in backticks that begin with a folder of the repository, with a line number or options after them at most.
NAMED = re.compile(
    r"`(?:python |accelerate launch )?"
    r"((?:diffusers_sparse3d|training|conversion|benchmarks|tests|docs|examples|checkpoints|\.ci|\.github)/[\w./*-]*)"
)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub forms them."""
    headings = re.findall(r"^#+ +(.*)$", without_code(path.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{link} is not there"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        # Results may not be recorded yet, and these words stand for any name.
        if not name.startswith("benchmarks/results/") and not re.search(r"NAME|OPERATOR", name):
            assert list(ROOT.glob(name)) if "*" in name else (ROOT / name).exists(), f"{name} is not there"


def test_every_page_of_docs_can_be_reached() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in reached:
                waiting.append(target)
    assert set((ROOT / "docs").rglob("*.md")) <= reached
