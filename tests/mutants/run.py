"""Plants the mistakes of the lists beside this file, one at a time, and says which of them the tests notice.

    python -m tests.mutants.run [--workers 2] [--select TEXT ...] [--every 10] [--json FILE [--resume]]

A list, `AREA.json`, has for each file of the package the tests that should notice, and pairs of a text that occurs
once in the file and what takes its place. A mutant is caught if one of these tests fails, or if they use more than
`--cpu-seconds`; one that they do not notice is tried on the tests of its whole part of the package, unless
`--listed-only` is given. At the end, all tests that failed run without a mutant: what fails then, too, has caught
nothing. Each worker has a copy of the package and the tests, so that the tree stays as it is. `--json` is written
after every mutant; with `--resume`, what was caught there in a file that has not changed since is not tried again, and
stays in the report.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from benchmarks.result_files import checked_out_commit, describe_hardware, installed_versions, write_report

from .lists import ROOT, Mutant, load_mutants
from .planting import Outcome, copy_tree, planted, run_exactly, run_tests


Record = dict[str, Any]


class Runner:
    """Workers with a tree each.

    Args:
        folder: that holds the trees.
        workers: number of trees, and of runs at a time.
        cpu_seconds: processor time after which the listed tests of a mutant count as without end; the wider ones have
            four times as much.
        listed_only: leave out the wider tests.
    """

    def __init__(self, folder: Path, workers: int, cpu_seconds: int, listed_only: bool) -> None:
        self.workers = workers
        self.cpu_seconds = cpu_seconds
        self.listed_only = listed_only
        self.trees: Queue[Path] = Queue()
        for index in range(workers):
            self.trees.put(copy_tree(folder / str(index)))

    def failures_without_mutants(self, tests: Iterable[str]) -> tuple[str, ...]:
        """Those of the tests that fail without any mutant, or are not there any more."""
        distinct = sorted({test for test in tests if "::" in test and not test.startswith("import of ")})
        tree = self.trees.get()
        try:
            return run_exactly(tree, distinct, 20 * self.cpu_seconds).failures if distinct else ()
        finally:
            self.trees.put(tree)

    def try_all(self, mutants: Sequence[Mutant], wider: bool) -> Iterator[tuple[Mutant, Outcome]]:
        """Each mutant and how its tests ended, in order."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from zip(mutants, pool.map(lambda mutant: self.try_mutant(mutant, wider), mutants))

    def try_mutant(self, mutant: Mutant, wider: bool) -> Outcome:
        """How the listed tests of a mutant end, or the wider ones."""
        tree = self.trees.get()
        try:
            with planted(mutant, tree):
                if wider:
                    return run_tests(tree, mutant.wider_tests, 4 * self.cpu_seconds)
                return run_tests(tree, mutant.tests, self.cpu_seconds)
        finally:
            self.trees.put(tree)

    def run(self, mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, Outcome]]:
        """Each mutant with its outcome by the listed tests, and after all of them the survivors' by the wider ones."""
        survivors = []
        for mutant, outcome in self.try_all(mutants, wider=False):
            if outcome.passed:
                survivors.append(mutant)
            yield mutant, outcome
        if survivors and not self.listed_only:
            yield from self.try_all(survivors, wider=True)


def caught_before(path: Path | None, mutants: Sequence[Mutant]) -> dict[Mutant, Record]:
    """Mutants that an earlier run caught, in files that have not changed since, and what it wrote about them."""
    if path is None or not path.exists():
        return {}
    known = {entry["key"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["mutants"]}
    found = {mutant: known.get(mutant.key()) for mutant in mutants}
    return {mutant: entry for mutant, entry in found.items() if entry is not None and entry["caught"]}


def summarize(records: Iterable[tuple[Mutant, Record]]) -> dict[str, Any]:
    """Counts of tried and caught mutants, by area and of all, and the survivors."""
    records = list(records)
    tried = Counter(mutant.area for mutant, _ in records)
    caught = Counter(mutant.area for mutant, record in records if record["caught"])
    return {
        "tried": tried.total(),
        "caught": caught.total(),
        "areas": {area: {"tried": tried[area], "caught": caught[area]} for area in tried},
        "survivors": [str(mutant) for mutant, record in records if not record["caught"]],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the mutants and prints the report; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    listed = load_mutants()
    texts = {mutant.file: (ROOT / mutant.file).read_text(encoding="utf-8") for mutant in listed}
    for mutant in listed:
        if texts[mutant.file].count(mutant.original) != 1:
            print(f"STALE    {mutant}: the file has changed, and so must the list")
    listed = [mutant for mutant in listed if texts[mutant.file].count(mutant.original) == 1]
    selected = [mutant for mutant in listed if any(text in f"{mutant.area} {mutant.file}" for text in args.select)][
        :: args.every
    ]
    if not selected:
        print(f"`--select` must be parts of the names of areas or files, got {args.select}", file=sys.stderr)
        return 2
    run = {
        "command": shlex.join(["python", "-m", "tests.mutants.run", *arguments]),
        "commit": checked_out_commit(),
        "hardware": describe_hardware("cpu"),
        "versions": installed_versions(),
    }
    records = caught_before(args.json if args.resume else None, listed)
    left = [mutant for mutant in selected if mutant not in records]
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(Path(temporary), args.workers, args.cpu_seconds, args.listed_only)
        for mutant, outcome in runner.run(left):
            caught = not outcome.passed
            records[mutant] = {"key": mutant.key(), "mutant": str(mutant), "caught": caught, "by": outcome.reason}
            print(f"{'caught  ' if caught else 'survives'} {mutant}  {outcome.reason}", flush=True)
            write_report(args.json, {**run, **summarize(records.items()), "mutants": list(records.values())})
        failures = runner.failures_without_mutants(record["by"] for record in records.values())
    for record in records.values():
        if record["by"] in failures:
            print(f"fails without any mutant, or is gone: {record['by']}")
            record["caught"] = False
    write_report(args.json, {**run, **summarize(records.items()), "mutants": list(records.values())})
    summary = summarize(records.items())
    for area, counts in {**summary["areas"], "all": summary}.items():
        print(f"{area:12} {counts['caught']:4} of {counts['tried']:4}")
    for survivor in summary["survivors"]:
        print(f"SURVIVES {survivor}")
    share = summary["caught"] / summary["tried"]
    print(f"{share:.1%} caught")
    return 0 if share >= args.least else 1


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time; default: %(default)s")
    parser.add_argument(
        "--select", nargs="+", default=[""], help="only mutants of areas or files whose names hold one of these texts"
    )
    parser.add_argument("--every", type=int, default=1, help="only every n-th mutant; default: all")
    parser.add_argument(
        "--cpu-seconds", type=int, default=90, help="that the listed tests of one may use; default: %(default)s"
    )
    parser.add_argument("--listed-only", action="store_true", help="leave out the wider tests for survivors")
    parser.add_argument("--least", type=float, default=0.95, help="share that must be caught; default: %(default)s")
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("--resume", action="store_true", help="keep what `--json` has as caught already")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
