"""Adds to the settings in pyproject.toml the description that package indexes show, and the wheel's configurations."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


REPOSITORY = "https://github.com/diffusers-sparse3d/diffusers_sparse3d"


def description(readme: str) -> str:
    """README.md with absolute addresses: a package index has none of the files that its links and pictures name."""
    readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/raw/main/", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", readme)


class BuildWithConfigurations(build_py):
    """Copies the configurations of `training/configs`, their one place in the repository, into the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "diffusers_sparse3d" / "training" / "configs"
            shutil.copytree(Path(__file__).parent / "training" / "configs", target, dirs_exist_ok=True)


if __name__ == "__main__":
    setup(
        cmdclass={"build_py": BuildWithConfigurations},
        long_description=description(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
