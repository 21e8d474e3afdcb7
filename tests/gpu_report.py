"""A pytest plugin that records a run of the tests on a GPU: `pytest -p tests.gpu_report --gpu-report FILE`."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import result_files


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU report")
    group.addoption("--gpu-report", type=Path, required=True, help="file for device, commit, versions and counts")
    group.addoption(
        "--commit", default=result_files.checked_out_commit(), help="that is tested; git is asked if not given"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError("a CUDA device is needed: without one, the kernels would run in the interpreter")
    # With pytest-xdist, the process that hands out the tests hears of all of them; its workers record nothing.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config), "gpu_report_recorder")


class Recorder:
    """Counts the outcomes of tests, and writes the file at the end of the run."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.failed: list[str] = []
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        # A test has three phases. It passes in its call, is skipped in its set-up, and may fail in each.
        if report.failed:
            self.counts["failed"] += 1
            self.failed.append(report.nodeid)
        elif report.when == "call" or report.skipped:
            self.counts[report.outcome] += 1
            if report.skipped:
                self.reasons[_reason(report)] += 1

    def pytest_sessionfinish(self) -> None:
        options = self.config.option
        report = {
            "command": "make test-gpu",
            "commit": options.commit,
            "hardware": result_files.describe_hardware("cuda"),
            "versions": result_files.installed_versions(),
            "tests": self.config.args,
            "counts": {name: self.counts[name] for name in ("passed", "failed", "skipped")},
            "skipped_because": dict(self.reasons.most_common()),
            "failed": self.failed,
            "seconds": round(self.seconds, 1),
        }
        result_files.write_report(options.gpu_report, report)


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped or, as pytest counts it too, failed as expected."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return getattr(report, "wasxfail", "")
