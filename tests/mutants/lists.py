"""The lists of mutants, `AREA.json` beside this file, and which tests should notice each of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# Tests that use everything; they and those of the mutant's own part of the package come after the listed ones.
THROUGHOUT = ("tests/properties", "tests/pipelines", "tests/test_small_pipeline.py")


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        area: name of the list that it is in.
        file: path of the file in the repository.
        original: text that occurs once in the file.
        mutated: what takes its place.
        tests: arguments of pytest: files or single tests that should notice.
    """

    area: str
    file: str
    original: str
    mutated: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The text of the file with the mistake.

        Raises:
            ValueError: if the original text does not occur once.
        """
        if (count := text.count(self.original)) != 1:
            raise ValueError(
                f"{self.area}.json: {self.original!r} must occur once in {self.file}, it does {count} times"
            )
        return text.replace(self.original, self.mutated)

    @property
    def wider_tests(self) -> tuple[str, ...]:
        """What is tried if the listed tests pass: the folder that mirrors the file, and tests of the whole."""
        part = PurePosixPath(self.file).parts[1]
        folder = f"tests/{part}" if (ROOT / "tests" / part).is_dir() else "tests/models"
        return (folder, *(path for path in THROUGHOUT if path != folder))

    def key(self, root: Path = ROOT) -> str:
        """A name that changes with the mutant and with the file that it is planted in."""
        source = (root / self.file).read_text(encoding="utf-8")
        return hashlib.sha256("\0".join([self.file, self.original, self.mutated, source]).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.file}: {self.original.strip()!r} -> {self.mutated.strip()!r}"


def load_mutants(folder: Path = FOLDER) -> list[Mutant]:
    """The mutants of all lists, in the order of the files."""
    mutants = []
    for path in sorted(folder.glob("*.json")):
        for file, entry in json.loads(path.read_text(encoding="utf-8")).items():
            for original, mutated in entry["mutants"]:
                mutants.append(Mutant(path.stem, file, original, mutated, tuple(entry["tests"])))
    return mutants
