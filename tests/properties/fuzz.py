"""Runs the property-based tests with new random examples, round after round: `make fuzz`.

    python -m tests.properties.fuzz --seconds 600 [--seed 0] [-- ARGUMENTS OF PYTEST]

It ends when the time is up, with exit status 0, or at the first round in which a test fails, with 1. The failure is
printed with the smallest example that hypothesis finds, the line that reproduces it, and the seed of the round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the rounds; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="when to start no further round; default: 600")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; by default the clock")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, as -k images")
    args = parser.parse_args(arguments)
    environment = {**os.environ, "SPARSE3D_PROPERTIES": "fuzz"}
    end, rounds = time.monotonic() + args.seconds, 0
    while rounds == 0 or time.monotonic() < end:
        seed = args.seed + rounds
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", *args.pytest]
        command.append(str(Path(__file__).parent))
        if status := subprocess.run(command, env=environment).returncode:
            again = f"{sys.executable} -m tests.properties.fuzz --seconds 0 --seed {seed}"
            print(f"round {rounds} failed with pytest's status {status}. Again: {again}", file=sys.stderr)
            return 1
        rounds += 1
    print(f"{rounds} rounds, seeds {args.seed} to {args.seed + rounds - 1}: no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
