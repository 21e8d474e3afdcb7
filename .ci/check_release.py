#!/usr/bin/env python3
"""Builds the sdist and the wheel and checks them; the wheel makes a mesh in an empty environment and folder.

    python .ci/check_release.py [--find-links FOLDER] [--no-install]

It takes the packages build and twine. `--find-links` is a folder of wheels for pip, such as PyTorch's for the CPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# What a wheel must hold, and what must not get into it.
NEEDED = (
    "py.typed",
    "cli/parser.py",
    "app/server.py",
    "training/configs/small/dit_dense.yaml",
    "ops/spatial_sparse_attention/README.md",
)
FORBIDDEN = ("tests/", "benchmarks/", "checkpoints/", ".safetensors", "__pycache__", ".partial")


def run(*command: str, **kwargs: object) -> None:
    """Runs a command; its failure ends this program."""
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run([str(word) for word in command], check=True, **kwargs)


def wheel_contents(wheel: Path) -> list[str]:
    """The files of a wheel, checked.

    Raises:
        SystemExit: if one is missing or one too many is there.
    """
    names = zipfile.ZipFile(wheel).namelist()
    for name in NEEDED:
        if f"diffusers_sparse3d/{name}" not in names:
            sys.exit(f"{wheel.name} lacks {name}")
    for name in names:
        if any(part in name for part in FORBIDDEN):
            sys.exit(f"{wheel.name} must not hold {name}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--find-links", help="folder of wheels for pip")
    parser.add_argument("--no-install", action="store_true", help="build and check alone")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
        run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
        (wheel,) = dist.glob("*.whl")
        names = wheel_contents(wheel)
        print("\n".join(names))
        print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.2f} MB")
        if not args.no_install:
            try_wheel(wheel, Path(folder), args.find_links)


def try_wheel(wheel: Path, folder: Path, find_links: str | None) -> None:
    """Installs a wheel in an empty environment and makes a mesh, far from the checkout."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    links = ("--find-links", find_links) if find_links else ()
    run(python, "-m", "pip", "install", "--quiet", *links, "-c", ROOT / "constraints.txt", wheel)
    work = folder / "work"
    work.mkdir()
    command = (python, "-m", "diffusers_sparse3d")
    run(*command, "--version", cwd=work)
    photo, mesh = ROOT / "examples" / "sofa.png", work / "sofa.glb"
    model = ROOT / "checkpoints" / "direct3d-s2-small"
    steps = ("--dense-steps", "4", "--steps", "1")
    run(*command, "generate", photo, "-o", mesh, "--model", model, *steps, cwd=work)
    if not mesh.stat().st_size:
        sys.exit("the mesh is empty")
    # Without a checkout there is no default model: the message says where models are.
    result = subprocess.run(
        [*map(str, command), "generate", str(photo), "-o", "x.glb"], cwd=work, capture_output=True, text=True
    )
    if result.returncode != 1 or "Hub" not in result.stderr:
        sys.exit(f"unexpected without a model: {result.stderr}")
    print("The wheel works.")


if __name__ == "__main__":
    main()
