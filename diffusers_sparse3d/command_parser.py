"""The argument parser of all commands: what is wrong is told in one sentence, and the exit status is 1."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """
    An `ArgumentParser` whose errors are one sentence, without the usage, and end the program with status 1.

    Options are taken with hyphens and with underscores: `--num-views` is `--num_views`. Those of trainings are spelled
    as in the scripts of diffusers, others as most programs have them.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._spelled_as_here(word) for word in words], namespace)

    def _spelled_as_here(self, word: str) -> str:
        """An option that is spelled another way, as it is spelled here; any other word is itself."""
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        spellings = (f"--{name[2:].replace('-', '_')}", f"--{name[2:].replace('_', '-')}")
        known = next((spelling for spelling in spellings if spelling in self._option_string_actions), name)
        return known + equals + value

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
