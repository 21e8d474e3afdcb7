"""The lists of mutants: at least 300 of them fit their files, are Python with the mistake, and have tests."""

import ast
import itertools
import json

import pytest

from tests.mutants.lists import ROOT, Mutant, load_mutants
from tests.mutants.planting import planted, run_exactly, run_tests
from tests.mutants.run import caught_before, summarize


def test_lists_fit_the_files():
    mutants = load_mutants()
    assert len(set(mutants)) == len(mutants)
    texts = {mutant.file: (ROOT / mutant.file).read_text(encoding="utf-8") for mutant in mutants}
    # Code that has changed since makes some of them stale; that is no reason for a change to fail.
    fresh = [mutant for mutant in mutants if texts[mutant.file].count(mutant.original) == 1]
    assert len(fresh) >= 300
    statements = {file: list(map(ast.dump, ast.parse(text).body)) for file, text in texts.items()}
    for mutant in fresh:
        mutated = map(ast.dump, ast.parse(mutant.apply(texts[mutant.file])).body)
        # The dumps take most of the time: those after the first that differs are not made.
        assert any(one != two for one, two in itertools.zip_longest(mutated, statements[mutant.file])), mutant
        for test in mutant.tests:
            assert (ROOT / test.split("::")[0]).exists(), mutant


def test_a_text_that_does_not_occur_once_is_named():
    for original in ("nothing", "a"):
        with pytest.raises(ValueError, match=r"area\.json: .* must occur once in file\.py"):
            Mutant("area", "file.py", original, "b", ()).apply("a = a")


@pytest.mark.usefixtures("fork_server")
def test_mutants_are_planted_in_the_copy_alone(tmp_path):
    """A tiny tree with a package and a test, through the same runs as the real one."""
    package, tests = tmp_path / "diffusers_sparse3d", tmp_path / "tests"
    package.mkdir()
    tests.mkdir()
    (package / "__init__.py").write_text("VALUE = 1\n")
    (tests / "test_value.py").write_text(
        "from diffusers_sparse3d import VALUE\n"
        "def test_value():\n    assert VALUE == 1\n    while VALUE != 1:\n        pass\n"
    )
    (tests / "test_endless.py").write_text(
        "from diffusers_sparse3d import VALUE\ndef test_end():\n    while VALUE != 1:\n        pass\n"
    )

    def outcome(mutated: str, *names: str, cpu_seconds: int = 20) -> tuple[bool, str]:
        mutant = Mutant("area", "diffusers_sparse3d/__init__.py", "1", mutated, names)
        with planted(mutant, tmp_path):
            outcome = run_tests(tmp_path, mutant.tests, cpu_seconds)
        assert (package / "__init__.py").read_text() == "VALUE = 1\n"
        return outcome.passed, outcome.reason

    assert outcome("1.0", "tests/test_value.py") == (True, "")
    assert outcome("2", "tests/test_value.py") == (False, "tests/test_value.py::test_value")
    assert outcome("=", "tests/test_value.py") == (False, "import of tests/test_value.py")
    with pytest.raises(RuntimeError, match="ended with 4"):
        outcome("2", "tests/test_nothing.py")
    assert outcome("2", "tests/test_endless.py", cpu_seconds=2) == (False, "SIGXCPU")
    # Without a mutant all pass; of tests that were named once, one is gone, and one file.
    names = ["tests/test_value.py::test_value", "tests/test_value.py::test_gone", "tests/test_none.py::test_none"]
    assert run_exactly(tmp_path, names, 20).failures == tuple(sorted(names[1:]))
    assert run_exactly(tmp_path, names[:1], 20).passed


def test_what_was_caught_is_kept_until_its_file_changes(tmp_path):
    known, unknown = load_mutants()[:2]
    entries = [{"key": known.key(), "caught": True, "by": "a test"}, {"key": unknown.key(), "caught": False}]
    path = tmp_path / "mutants.json"
    assert caught_before(path, [known]) == {}
    path.write_text(json.dumps({"mutants": entries}))
    assert caught_before(path, [known, unknown]) == {known: entries[0]}
    entries[0]["key"] = "of another state of the file"
    path.write_text(json.dumps({"mutants": entries}))
    assert caught_before(path, [known, unknown]) == {}


def test_key_is_of_the_mutant_and_of_the_file(tmp_path):
    (tmp_path / "file.py").write_text("a = 1")
    mutant = Mutant("area", "file.py", "1", "2", ())
    key = mutant.key(tmp_path)
    assert key != Mutant("area", "file.py", "1", "3", ()).key(tmp_path)
    (tmp_path / "file.py").write_text("a = 1  # other")
    assert key != mutant.key(tmp_path)


def test_shares_are_counted_by_area():
    one, two, three = (Mutant(area, "file.py", "1", "2", ()) for area in ("a", "a", "b"))
    records = [(one, {"caught": True}), (two, {"caught": False}), (three, {"caught": True})]
    summary = summarize(records)
    assert (summary["tried"], summary["caught"], summary["survivors"]) == (3, 2, [str(two)])
    assert summary["areas"] == {"a": {"tried": 2, "caught": 1}, "b": {"tried": 1, "caught": 1}}
