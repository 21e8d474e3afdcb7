"""The check that refuses Triton interfaces which some supported version does not have."""

import importlib.util
from pathlib import Path

import pytest


PATH = Path(__file__).parents[1] / ".ci" / "check_triton_interfaces.py"
SPEC = importlib.util.spec_from_file_location("check_triton_interfaces", PATH)
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("import triton.language as tl\ny = tl.libdevice.tanh(x)", "extra.libdevice"),
        ("import triton.language as tl\ny = tl.math.tanh(x)", "extra.libdevice"),
        ("from triton import language\ny = language.math.pow(x, 2)", "extra.libdevice"),
        ("from triton.language import math as m\ny = m.tanh(x)", "extra.libdevice"),
        ("import triton\nt = triton.testing.do_bench(f)", "triton.testing"),
        ("from triton.testing import do_bench\n", "triton.testing"),
        ("import triton.testing\n", "triton.testing"),
        ("import triton.language as tl\np = tl.make_block_ptr(x)", "removed in triton 3.9"),
        ("import triton.language as tl\np = tl.topk(x, 4)", "not before triton 3.4"),
        ("import triton.language as tl\ny = tl.dot(a, b, allow_tf32=False)", "input_precision"),
        ("from triton import autotune\n@autotune([], key=[], warmup=5)\ndef f(): ...", "do_bench"),
    ],
)
def test_refused(code: str, part: str) -> None:
    messages = check.findings(code)
    assert len(messages) == 1 and part in messages[0][1]


@pytest.mark.parametrize(
    "code",
    [
        "import triton.language as tl\ny = tl.math.exp2(tl.dot(a, b, input_precision='ieee'))",
        "from triton.language.extra import libdevice\ny = libdevice.tanh(x)",
        "import math\ny = math.tanh(tl.math.tanh)",  # `tl` is not triton's here
        "import triton\nx = triton.cdiv(a, b)",
        "x.view(3)",
    ],
)
def test_allowed(code: str) -> None:
    assert check.findings(code) == []


def test_lines_are_named_and_files_make_it_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernel.py"
    path.write_text("import triton.language as tl\n\n\ny = tl.view(x, (4,))\n")
    assert check.main([str(path)]) == 1
    assert f"{path}:4: triton.language.view" in capsys.readouterr().out
    path.write_text("import triton.language as tl\n")
    assert check.main([str(path)]) == 0


def test_this_repository_passes() -> None:
    assert check.main([]) == 0
