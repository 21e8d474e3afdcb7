#!/usr/bin/env python3
"""Refuses interfaces of Triton that some supported version does not have, or that are deprecated.

    python .ci/check_triton_interfaces.py [FILE ...]

Without files, all Python files of the repository are checked. Supported is what pyproject.toml asks for, triton 3.3,
and everything newer that the tables below were compared with, up to triton 3.9.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


FOLDERS = ("diffusers_sparse3d", "training", "conversion", "benchmarks", "tests")

# Names, each with what replaces it. A name stands for all that is below it too.
REFUSED = {
    "triton.ops": "removed in triton 3.0: write the kernel here",
    "triton.testing": "an interface of triton's own benchmarks: time with the timers in benchmarks/",
    "triton.language.libdevice": "removed in triton 3.0: use triton.language.extra.libdevice",
    "triton.language.make_block_ptr": "removed in triton 3.9: compute the pointers",
    "triton.language.advance": "removed in triton 3.9: compute the pointers",
    "triton.language.view": "deprecated: use triton.language.reshape",
    "triton.language.async_task": "only in triton 3.4 and 3.5",
    "triton.language.nv_tma_desc_type": "removed in triton 3.4",
    "triton.language._experimental_descriptor_load": "removed in triton 3.4",
    "triton.language._experimental_descriptor_store": "removed in triton 3.4",
    "triton.language._experimental_make_tensor_descriptor": "removed in triton 3.4",
    "triton.language.semantic": "not in triton 3.4 and newer",
    "triton.language.constexpr_function": "only in triton 3.4",
    "triton.compiler.code_generator": "not exported by triton 3.4 and newer",
}
# All of `triton.language.math` that is left since triton 3.0, which moved the rest to libdevice.
MATH = {
    *("abs", "ceil", "cos", "div_rn", "erf", "exp", "exp2", "fdiv", "floor", "fma", "log", "log2", "rsqrt", "sin"),
    *("sqrt", "sqrt_rn", "umulhi"),
}
# Names that triton 3.3 does not have yet, with the version that added them.
ADDED = {
    **dict.fromkeys(("triton.knobs", "triton.must_use_result"), "3.4"),
    **dict.fromkeys(("triton.constexpr_function", "triton.AsyncCompileMode"), "3.5"),
    "triton.language.core._aggregate": "3.4",
    "triton.aggregate": "3.9",
    **{
        f"triton.language.{name}": "3.4"
        for name in (
            *("bitonic_merge", "load_tensor_descriptor", "make_tensor_descriptor", "reduce_or"),
            *("store_tensor_descriptor", "tensor_descriptor", "topk"),
        )
    },
    **dict.fromkeys(("triton.language.map_elementwise", "triton.language.condition"), "3.5"),
    **dict.fromkeys(("triton.language.mul", "triton.language.sub"), "3.6"),
    **{
        f"triton.language.{name}": "3.9"
        for name in (
            *("aggregate_replace", "atomic_load", "atomic_poll", "atomic_store", "expect_zero", "squeeze"),
            *("to_tensor", "unsqueeze"),
        )
    },
}
# Deprecated arguments of functions.
ARGUMENTS = {
    ("triton.language.dot", "allow_tf32"): "deprecated: use `input_precision`",
    ("triton.language.cat", "can_reorder"): "removed in triton 3.10",
    ("triton.language.reshape", "can_reorder"): "removed in triton 3.10",
    ("triton.language.softmax", "keep_dims"): "deprecated and ignored",
    ("triton.autotune", "warmup"): "deprecated: use `do_bench`",
    ("triton.autotune", "rep"): "deprecated: use `do_bench`",
    ("triton.autotune", "use_cuda_graph"): "deprecated: use `do_bench`",
}


def findings(source: str) -> list[tuple[int, str]]:
    """Line numbers and messages of all that a Python file uses and must not, in the order of the lines."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    found = set()
    for node in ast.walk(tree):
        for name in _used_names(node, names):
            message = _objection(name)
            if message is not None:
                found.add((node.lineno, message))
        if isinstance(node, ast.Call):
            function = _full_name(node.func, names)
            for keyword in node.keywords:
                message = ARGUMENTS.get((function, keyword.arg))
                if message is not None:
                    found.add((keyword.value.lineno, f"{function}({keyword.arg}=...): {message}"))
    return sorted(found)


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, of imports from triton."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "triton":
                    names[alias.asname or "triton"] = alias.name if alias.asname else "triton"
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "triton":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _full_name(node: ast.expr, names: dict[str, str]) -> str | None:
    """The full name of an attribute below triton; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _full_name(node.value, names)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def _used_names(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        name = _full_name(node, names)
        if name is not None:
            yield name
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith("triton."))
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "triton":
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _objection(name: str) -> str | None:
    """What is refused about a name, if anything: the shortest refused part of it, and why."""
    parts = name.split(".")
    for end in range(2, len(parts) + 1):
        part = ".".join(parts[:end])
        if part in REFUSED:
            return f"{part}: {REFUSED[part]}"
        if part in ADDED:
            return f"{part}: not before triton {ADDED[part]}, and 3.3 is supported"
        if parts[:3] == ["triton", "language", "math"] and end == 4 and parts[3] not in MATH:
            return f"{part}: removed in triton 3.0, use triton.language.extra.libdevice"
    return None


def main(arguments: list[str]) -> int:
    root = Path(__file__).parents[1]
    paths = map(Path, arguments) if arguments else (path for name in FOLDERS for path in (root / name).rglob("*.py"))
    count = 0
    for path in paths:
        for line, message in findings(path.read_text(encoding="utf-8")):
            print(f"{path}:{line}: {message}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
