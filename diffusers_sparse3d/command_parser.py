"""The argument parser of all commands: what is wrong is told in one sentence, and the exit status is 1."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one sentence, without the usage, and end the program with status 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A `type` of arguments: integers from `low` to `high`, without an upper end if None."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            span = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be an integer {span}, got {text!r}")
        return value

    return parse


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A `type` of arguments: finite numbers from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            bounds = (f"at least {low:g}" * (low > -math.inf), f"at most {high:g}" * (high < math.inf))
            span = " and ".join(filter(None, bounds))
            raise argparse.ArgumentTypeError(f"must be a finite number{f' of {span}' * bool(span)}, got {text!r}")
        return value

    return parse
