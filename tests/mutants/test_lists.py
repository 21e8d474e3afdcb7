"""The lists of mutants: at least 300 of them fit their files, are Python with the mistake, and have tests."""

import ast
import subprocess

import pytest

from tests.mutants import run
from tests.mutants.run import ROOT, Mutant, is_caught, load_mutants


def test_lists_fit_the_files():
    mutants = load_mutants()
    assert len(set(mutants)) == len(mutants)
    texts = {mutant.file: (ROOT / mutant.file).read_text(encoding="utf-8") for mutant in mutants}
    # Code that has changed since makes some of them stale; that is no reason for a change to fail.
    fresh = [mutant for mutant in mutants if texts[mutant.file].count(mutant.original) == 1]
    assert len(fresh) >= 300
    for mutant in fresh:
        mutated = mutant.apply(texts[mutant.file])
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(texts[mutant.file])), mutant
        for test in mutant.tests:
            assert (ROOT / test.split("::")[0]).exists(), mutant


def test_a_text_that_does_not_occur_once_is_named():
    for original in ("nothing", "a"):
        with pytest.raises(ValueError, match=r"area\.json: .* must occur once in file\.py"):
            Mutant("area", "file.py", original, "b", ()).apply("a = a")


def test_mutants_are_planted_in_the_copy_alone(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("VALUE = 1\n")
    seen = []

    def fake_run(command, cwd, **kwargs):
        seen.append((cwd / "module.py").read_text())
        return subprocess.CompletedProcess(command, returncodes.pop(), "", "")

    monkeypatch.setattr(run.subprocess, "run", fake_run)
    mutant = Mutant("area", "module.py", "1", "2", ("test_module.py",))
    returncodes = [4, 0, 1]
    assert is_caught(mutant, tmp_path, 1) is True
    assert is_caught(mutant, tmp_path, 1) is False
    with pytest.raises(RuntimeError, match="pytest ended with 4"):
        is_caught(mutant, tmp_path, 1)
    assert seen == ["VALUE = 2\n"] * 3 and (tmp_path / "module.py").read_text() == "VALUE = 1\n"
