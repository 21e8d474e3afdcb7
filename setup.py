"""Adds to the settings in pyproject.toml the description that package indexes show."""

import re
from pathlib import Path

from setuptools import setup


REPOSITORY = "https://github.com/diffusers-sparse3d/diffusers_sparse3d"


def description(readme: str) -> str:
    """README.md with absolute addresses: a package index has none of the files that its links and pictures name."""
    readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/raw/main/", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", readme)


if __name__ == "__main__":
    setup(
        long_description=description(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
