"""The command `print`: a mesh as a file for slicers, and a report."""

from __future__ import annotations

import argparse

from ..checks import check_packages
from .latents import read_mesh
from .outputs import check_writable


PRINT_SUFFIXES = (".3mf", ".stl")


def print_mesh(args: argparse.Namespace) -> None:
    """Prints what stands against printing a mesh, and writes it in millimetres, z up, on the build plate."""
    from ..geometry.mesh import check_export_support, export_mesh
    from ..geometry.printing import prepare_for_printing, print_report

    if args.output is not None:
        if args.output.suffix.lower() not in PRINT_SUFFIXES:
            raise ValueError(f"`--output` must end in .3mf or .stl, got {str(args.output)!r}")
        check_export_support(args.output)
        check_writable("--output", args.output)
    check_packages("`print`", "embreex")
    mesh = prepare_for_printing(read_mesh(args.mesh), args.size)
    print(print_report(mesh, args.min_wall))
    if args.output is not None:
        print(export_mesh(mesh, args.output))
