"""What benchmarks say about their runs."""

import argparse
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import result_files


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", nargs="+", default=[None])
    parser.add_argument("--device", default="cpu")
    return result_files.parse_arguments(parser, "/somewhere/benchmarks/ssa.py", arguments)


@pytest.mark.parametrize("commit", [["--commit", "abc"], ["--commit=abc"]])
def test_folders_of_this_machine_are_left_out(commit: list[str]) -> None:
    args = parse(["--mesh", "/data/a chair.glb", "models/sofa.glb", *commit, "--json", "/results/ssa.json"])
    report = result_files.describe_run(args)
    assert report["command"] == "python benchmarks/ssa.py --mesh 'a chair.glb' models/sofa.glb --json ssa.json"
    assert report["commit"] == "abc"
    assert report["settings"] == {"mesh": ["a chair.glb", "models/sofa.glb"], "device": "cpu"}
    assert set(report["hardware"]) == {"processor", "cores"}
    assert {"python", "diffusers_sparse3d", "torch", "diffusers"} <= set(report["versions"])


def test_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_files, "ROOT", tmp_path)
    assert result_files.checked_out_commit() is None and parse([]).commit is None

    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "First")
    commit = git("rev-parse", "HEAD")[:10]
    assert parse([]).commit == commit
    (tmp_path / "file").write_text("two")
    assert parse([]).commit == f"{commit}-dirty"


def test_reports_are_written_where_asked(tmp_path: Path) -> None:
    result_files.write_report(None, {"rows": []})
    result_files.write_report(tmp_path / "new" / "x.json", {"rows": [1.5]})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"rows": [1.5]}
