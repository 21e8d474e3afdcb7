"""The files that benchmarks write: one JSON each, with the run that it comes from beside its figures.

The scripts of this folder import it as their neighbour, as `python benchmarks/NAME.py` finds it.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffusers_sparse3d.version import __version__


PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "scipy", "trimesh")
ROOT = Path(__file__).parents[1]


def parse_arguments(
    parser: argparse.ArgumentParser, script: str, arguments: list[str] | None = None
) -> argparse.Namespace:
    """The parsed command line of a benchmark, with `--json` and `--commit` added to its own options.

    Args:
        parser: with the benchmark's own options.
        script: `__file__` of the benchmark.
        arguments: as in `argparse`; those of the process by default.

    Returns:
        The options, and `command`, the command line as a reader would type it.
    """
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--commit", default=checked_out_commit(), help="that is measured; by default git is asked")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    words = [_without_folder(argument) for argument in arguments if argument != f"--commit={args.commit}"]
    if "--commit" in words:
        place = words.index("--commit")
        del words[place : place + 2]
    args.command = shlex.join(["python", *_program(Path(script)), *words])
    return args


def _program(script: Path) -> list[str]:
    """How Python is told to run a benchmark: those in folders of their own are modules."""
    folder = script.parent.name
    return [f"benchmarks/{script.name}"] if folder == "benchmarks" else ["-m", f"benchmarks.{folder}.{script.stem}"]


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """Where the figures of a run come from: its command, commit, settings, hardware and versions.

    Args:
        args: of `parse_arguments`. With an option `device`, the GPU is named only if it is measured.
    """
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "commit", "command")}
    return {
        "command": args.command,
        "commit": args.commit,
        "hardware": describe_hardware(getattr(args, "device", "cpu")),
        "versions": installed_versions(),
        "settings": {name: _plain(value) for name, value in settings.items()},
    }


def describe_hardware(device: str) -> dict[str, Any]:
    """The name and number of GPUs, where `device` is one, and the processor with the cores of this process."""
    hardware: dict[str, Any] = {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    if torch.device(device).type == "cuda":
        hardware = {"device": torch.cuda.get_device_name(device), **hardware}
    return hardware


def installed_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that it is measured with."""
    versions = {"python": platform.python_version(), "diffusers_sparse3d": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def checked_out_commit() -> str | None:
    """The abbreviated commit of this checkout, ending in "-dirty" with changes; None where git does not know it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report as JSON, beside its place and then renamed; without a path nothing is written.

    Benchmarks write what they have so far after each row: a run that is stopped keeps it.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(report, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def earlier_rows(args: argparse.Namespace, but: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows that the file of `--json` has already, for a table that is filled in several runs.

    Args:
        args: of `parse_arguments`.
        but: settings that may differ between the runs of one table.

    Raises:
        ValueError: if they were measured with other settings or on another device.
    """
    if args.json is None or not args.json.exists():
        return []
    report, own = json.loads(args.json.read_text(encoding="utf-8")), describe_run(args)
    settings = [{name: value for name, value in one["settings"].items() if name not in but} for one in (report, own)]
    devices = [one["hardware"].get("device") for one in (report, own)]
    if settings[0] != settings[1] or devices[0] != devices[1]:
        raise ValueError(f"`--json` {args.json} has rows of other settings or another device: give another file")
    rows: list[dict[str, Any]] = report["rows"]
    return rows


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    """A setting as JSON takes it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _without_folder(str(value)) if isinstance(value, (str, Path)) else value


def _without_folder(argument: str) -> str:
    """The last part of an absolute path: folders of one machine say nothing to readers on another."""
    return Path(argument).name if os.path.isabs(argument) else argument
