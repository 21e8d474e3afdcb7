"""Plants the mistakes of the lists beside this file, one at a time, and says which of them the tests notice.

    python -m tests.mutants.run [--workers 2] [--select TEXT] [--every 10] [--json FILE]

A list, `AREA.json`, has for each file of the package the tests that should notice, and pairs of a text that occurs
once in the file and what takes its place. A mutant is caught if a test fails, or if the tests take longer than
`--timeout`. Each worker has a copy of the package and the tests of its own, so that the tree stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue


FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# What a worker needs beside the package and the tests.
LINKED = ("checkpoints", "examples", "benchmarks", "docs", "training", "conversion", "README.md", "CHANGELOG.md")
COPIED = ("diffusers_sparse3d", "tests", "pyproject.toml")
# Exit status of pytest if tests failed; all others but 0 (no tests, wrong usage) are mistakes of a list.
TESTS_FAILED = 1


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


def copy_tree(folder: Path) -> Path:
    """A copy of what the tests need, with links to what no mutant changes."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for name in LINKED:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


def is_caught(mutant: Mutant, tree: Path, timeout: float) -> bool:
    """Whether the tests of a mutant, planted in the copy `tree`, fail or take too long.

    Raises:
        RuntimeError: if the tests cannot be run.
    """
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(text), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
    try:
        run = subprocess.run(command, cwd=tree, env=environment, timeout=timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text, encoding="utf-8")
    if run.returncode in (0, TESTS_FAILED):
        return run.returncode == TESTS_FAILED
    # A package that cannot be imported ends the collection of tests.
    if "Error" in run.stdout + run.stderr and "collection" in run.stdout + run.stderr:
        return True
    raise RuntimeError(f"{mutant}: pytest ended with {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")


def run_mutants(mutants: Sequence[Mutant], workers: int, timeout: float) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether it is caught, in order."""
    with tempfile.TemporaryDirectory() as temporary:
        trees: Queue[Path] = Queue()
        for index in range(workers):
            folder = Path(temporary, str(index))
            folder.mkdir()
            trees.put(copy_tree(folder))

        def try_mutant(mutant: Mutant) -> bool:
            tree = trees.get()
            try:
                return is_caught(mutant, tree, timeout)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(workers) as pool:
            yield from zip(mutants, pool.map(try_mutant, mutants))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the mutants and prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time; default: %(default)s")
    parser.add_argument("--select", default="", help="only mutants of areas or files whose name holds this text")
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant; default: all")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds for the tests of one; default: %(default)s"
    )
    parser.add_argument("--least", type=float, default=0.95, help="share that must be caught; default: %(default)s")
    parser.add_argument("--json", type=Path, help="file to write the survivors to")
    args = parser.parse_args(arguments)
    mutants = [mutant for mutant in load_mutants() if args.select in f"{mutant.area} {mutant.file}"][:: args.every]
    if not mutants:
        parser.error(f"`--select` must be part of the name of an area or file, got {args.select!r}")
    texts = {mutant.file: (ROOT / mutant.file).read_text(encoding="utf-8") for mutant in mutants}
    stale = [mutant for mutant in mutants if texts[mutant.file].count(mutant.original) != 1]
    for mutant in stale:
        print(f"STALE    {mutant}: the file has changed, and so must the list")
    mutants = [mutant for mutant in mutants if mutant not in stale]
    total: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    survivors = []
    for mutant, noticed in run_mutants(mutants, args.workers, args.timeout):
        total[mutant.area] += 1
        caught[mutant.area] += noticed
        if not noticed:
            survivors.append(mutant)
        print(f"{'caught  ' if noticed else 'SURVIVES'} {mutant}", flush=True)
    for area in total:
        print(f"{area:12} {caught[area]:4} of {total[area]:4}")
    share = caught.total() / total.total()
    print(f"{'all':12} {caught.total():4} of {total.total():4}, {share:.1%}")
    if args.json is not None:
        report = {
            "total": total.total(),
            "caught": caught.total(),
            "survivors": [asdict(mutant) for mutant in survivors],
        }
        args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if share >= args.least else 1


if __name__ == "__main__":
    sys.exit(main())
