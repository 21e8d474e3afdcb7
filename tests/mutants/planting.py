"""Copies of the tree that mistakes are planted in, and runs of the tests there."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lists import ROOT, Mutant


# What a copy needs beside the package and the tests.
LINKED = ("checkpoints", "examples", "benchmarks", "docs", "training", "conversion", "README.md", "CHANGELOG.md")
COPIED = ("diffusers_sparse3d", "tests", "pyproject.toml")
# A mistake in a size must not take the memory of the machine; PyTorch alone reserves a few GB of addresses.
ADDRESS_SPACE = 16 << 30
# One process imports the third-party packages; each run of tests is a fork of it, which saves seconds a run.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.mutants.preloaded"])


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended.

    Attributes:
        failures: the tests that failed, in their order, or what ended the run.
    """

    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all tests did."""
        return not self.failures

    @property
    def reason(self) -> str:
        """What failed first."""
        return self.failures[0] if self.failures else ""


def copy_tree(folder: Path) -> Path:
    """`folder`, with a copy of what mutants change and links to the rest that the tests need."""
    folder.mkdir(parents=True)
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


@contextmanager
def planted(mutant: Mutant, tree: Path) -> Iterator[None]:
    """The mutant in the tree, while this context lasts."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(text), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(tree: Path, tests: Sequence[str], cpu_seconds: int) -> Outcome:
    """Runs tests in a tree until the first that fails.

    The limit counts processor time, which a busy machine does not change. A run that waits for nothing is ended after
    twenty times as long; only if it does so twice, it counts.

    Raises:
        RuntimeError: if the tests could not be run.
    """
    arguments = ["-x", *tests]
    outcome = _run_once(tree, arguments, cpu_seconds)
    return _run_once(tree, arguments, cpu_seconds) if outcome.reason == "waits" else outcome


def run_exactly(tree: Path, tests: Collection[str], cpu_seconds: int) -> Outcome:
    """Runs single tests in a tree, all of them; those that are not there any more fail.

    Raises:
        RuntimeError: if the tests could not be run.
    """
    files = sorted({file for test in tests if (tree / (file := test.partition("::")[0])).exists()})
    return _run_once(tree, files, cpu_seconds, frozenset(tests)) if files else Outcome(tuple(sorted(tests)))


def _run_once(tree: Path, arguments: Sequence[str], cpu_seconds: int, only: frozenset[str] | None = None) -> Outcome:
    report = tree / "report.json"
    report.unlink(missing_ok=True)
    process = CONTEXT.Process(target=run_pytest, args=(tree, arguments, report, cpu_seconds, only))
    process.start()
    process.join(20 * cpu_seconds)
    waits = process.exitcode is None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    failures: list[str] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else []
    if waits:
        failures.append("waits")
    elif process.exitcode < 0:
        failures.append(signal.Signals(-process.exitcode).name)
    if process.exitcode != 0 and not failures:
        log = (tree / "pytest.log").read_text(encoding="utf-8")
        raise RuntimeError(f"pytest ended with {process.exitcode}: {log[-2000:]}")
    return Outcome(tuple(failures))


class FailureRecorder:
    """A plugin of pytest that writes what fails into a file at once: a run that dies later has failed all the same.

    Args:
        report: the file.
        only: the tests to run, all if None; those that are not found fail.
    """

    def __init__(self, report: Path, only: frozenset[str] | None) -> None:
        self.report = report
        self.only = only
        self.failures: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.only is not None:
            items[:] = [item for item in items if item.nodeid in self.only]
            for missing in sorted(self.only - {item.nodeid for item in items}):
                self._add(missing)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._add(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(f"import of {report.nodeid or 'conftest.py'}")

    def _add(self, failure: str) -> None:
        self.failures.append(failure)
        self.report.write_text(json.dumps(self.failures), encoding="utf-8")


def run_pytest(
    tree: Path, arguments: Sequence[str], report: Path, cpu_seconds: int, only: frozenset[str] | None
) -> None:
    """Runs pytest in this process, which is a fork for this alone, and exits with its status."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 10))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    log = os.open(tree / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(PYTHONPATH=str(tree), OMP_NUM_THREADS="1")
    # The fork has these of the tree that is not changed.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "diffusers_sparse3d")]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True

    import pytest

    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tree / 'temporary'}"]
    os._exit(pytest.main([*options, *arguments], plugins=[FailureRecorder(report, only)]))
