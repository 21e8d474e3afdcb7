"""Benchmarks of new processes: a script runs itself again, with a cache of triton's kernels of its own."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


VARIABLE = "DIFFUSERS_SPARSE3D_RUNTIME"


def add_worker_option(parser: argparse.ArgumentParser) -> None:
    """Add the option by which `seconds_of` tells a script that it is the new process."""
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def seconds_of(script: str, arguments: Sequence[str], cache: str | Path, settings: str) -> dict[str, float]:
    """The seconds that a new process prints as JSON in its last line.

    Args:
        script: path of the script, which has the option of `add_worker_option`.
        arguments: of its command line.
        cache: folder of triton's cache.
        settings: of the runtime of the operators, the value of the environment variable.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), VARIABLE: settings}
    command = [sys.executable, script, "--worker", *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return seconds
