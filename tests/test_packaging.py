"""The settings of the package, and what package indexes show."""

import re
import runpy
from pathlib import Path

import pytest

import diffusers_sparse3d


ROOT = Path(__file__).parents[1]
SETTINGS = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def requirements(text: str) -> dict[str, str]:
    """Versions by the names of packages, of lines such as "torch==2.7.0"."""
    return {name.lower(): version for name, version in re.findall(r"^([\w-]+)==([^;\s]+)", text, flags=re.M)}


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition(".post")[0])))


def test_oldest_versions_are_the_floors() -> None:
    floors = dict(re.findall(r'^ +"([\w-]+)>=([\d.]+)', SETTINGS, flags=re.M))
    oldest = requirements((ROOT / ".github" / "oldest.txt").read_text(encoding="utf-8"))
    assert len(oldest) > 15
    for name, version in oldest.items():
        floor = next(floor for package, floor in floors.items() if package.lower() == name)
        width = len(as_numbers(floor))
        assert as_numbers(version)[:width] == as_numbers(floor), name


def test_pinned_versions_are_above_the_floors() -> None:
    floors = {name.lower(): as_numbers(floor) for name, floor in re.findall(r'"([\w-]+)>=([\d.]+)', SETTINGS)}
    pinned = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    # Every direct dependency is pinned, the build system's own apart.
    assert set(floors) - {"setuptools"} <= set(pinned)
    for name, floor in floors.items():
        if name != "setuptools":
            assert as_numbers(pinned[name]) >= floor, name


@pytest.fixture
def description() -> str:
    shim = runpy.run_path(str(ROOT / "setup.py"))
    return shim["description"]((ROOT / "README.md").read_text(encoding="utf-8"))


def test_links_and_pictures_on_a_package_index_are_absolute(description: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", description)
    assert len(targets) > 5 and all(target.startswith("https://") for target in targets)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", description)
    # The badge is drawn by the server that runs the tests.
    pictures = [picture for picture in pictures if not picture.endswith("/badge.svg")]
    assert pictures and all("/raw/main/" in picture for picture in pictures)
    assert all(picture.partition("/raw/main/")[0] in SETTINGS for picture in pictures)


def test_addresses_of_the_project_agree() -> None:
    address = re.search(r'^Repository = "(.*)"$', SETTINGS, flags=re.M).group(1)
    for name in ("setup.py", "CITATION.cff", "CHANGELOG.md"):
        assert address in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_citation_names_the_version() -> None:
    assert f"\nversion: {diffusers_sparse3d.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_types_are_shipped() -> None:
    assert (Path(diffusers_sparse3d.__file__).parent / "py.typed").exists()
