"""The record of the tests on a GPU, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import gpu_report


def outcome(name: str, when: str, result: str) -> pytest.TestReport:
    return pytest.TestReport(name, (name, 1, name), {}, result, None, when, duration=0.5)


SKIPPING = """
import pytest

@pytest.mark.skipif(True, reason="needs two GPUs")
@pytest.mark.parametrize("number", range(2))
def test_marked(number):
    pass

def test_in_its_call():
    pytest.skip("needs triton: none")

@pytest.mark.xfail(reason="not yet")
def test_expected_to_fail():
    assert False

def test_passes():
    pass
"""


def test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.result_files, "describe_hardware", lambda device: {"device": "a GPU"})
    option = SimpleNamespace(gpu_report=tmp_path / "test_gpu.json", commit="abc")
    recorder = gpu_report.Recorder(SimpleNamespace(option=option, args=["tests/ops"]))
    for name, phases in {
        "passes": {"setup": "passed", "call": "passed", "teardown": "passed"},
        "fails": {"setup": "passed", "call": "failed", "teardown": "passed"},
        "has no set-up": {"setup": "failed", "teardown": "passed"},
        "is skipped": {"setup": "skipped", "teardown": "passed"},
    }.items():
        for when, result in phases.items():
            recorder.pytest_runtest_logreport(outcome(name, when, result))
    recorder.pytest_sessionfinish()
    report = json.loads(option.gpu_report.read_text())
    assert report["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert report["failed"] == ["fails", "has no set-up"] and report["seconds"] == 5.0
    assert report["commit"] == "abc" and report["hardware"] == {"device": "a GPU"}
    assert {"torch", "diffusers_sparse3d"} <= set(report["versions"])


def test_reasons_of_skipped_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.result_files, "describe_hardware", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    options = ["-p", "tests.gpu_report", "--gpu-report", str(tmp_path / "report.json"), "--commit", "abc"]
    pytest.main([*options, "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_skipping.py")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"] == {"passed": 1, "failed": 0, "skipped": 4}
    assert report["skipped_because"] == {"needs two GPUs": 2, "needs triton: none": 1, "not yet": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_is_needed(tmp_path: Path) -> None:
    options = ["-p", "tests.gpu_report", "--gpu-report", str(tmp_path / "report.json"), "tests/test_gpu_report.py"]
    result = subprocess.run([sys.executable, "-m", "pytest", *options], capture_output=True, text=True)
    assert result.returncode != 0 and "a CUDA device is needed" in result.stderr
    assert not (tmp_path / "report.json").exists()
