"""
The command line `diffusers-sparse3d`: pipelines and VAEs on files, the web app, training and its tools, conversion.

- `parser.py`: all commands and their arguments.
- `errors.py`: what is said of an error.
- `pictures.py`, `outputs.py`: which files a command reads and writes, checked before any work.
- `generate.py`, `latents.py`, `information.py`, `view.py`: the commands.

Nothing heavy is imported here, so that the help appears at once: each command imports what it needs.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

from .errors import explain
from .parser import LIBRARY_COMMANDS, make_parser


__all__ = ["LIBRARY_COMMANDS", "main", "make_parser"]


def library_command(argv: Sequence[str]) -> tuple[str, ...] | None:
    """The words of the command of `LIBRARY_COMMANDS` that arguments begin with; None for the other commands."""
    return next((words for words in LIBRARY_COMMANDS if tuple(argv[: len(words)]) == words), None)


def run_library_command(words: tuple[str, ...], arguments: Sequence[str]) -> int:
    """Runs a command of `LIBRARY_COMMANDS` with the arguments after its words, and returns its exit status."""
    module = import_module(f"..{LIBRARY_COMMANDS[words][0]}", __package__)
    return int(module.main(arguments, prog=" ".join(("diffusers-sparse3d", *words))) or 0)


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """
    Look for garbage in cycles less often inside the `with` block.

    What a command imports is not garbage, and makes a million objects: Python would look through them a thousand
    times, which is a sixth of the time of all imports.
    """
    thresholds = gc.get_threshold()
    if gc.isenabled():
        gc.set_threshold(10_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv: the words after the program's name; those of the process if None. `--debug`, in any place, lets errors
            through with their traceback.

    Returns:
        The exit status: 0, or 1 after an error, of which one sentence has gone to stderr.

    Raises:
        SystemExit: with status 1 for arguments that do not fit, 0 after `--help` and `--version`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    debug, argv = "--debug" in argv, [word for word in argv if word != "--debug"]
    words = library_command(argv)
    try:
        if words is not None:
            return run_library_command(words, argv[len(words) :])
        args = make_parser().parse_args(argv)
        with collecting_rarely():
            command = import_module(f".{args.module}", __package__)
            return int(getattr(command, args.function)(args) or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        print(f"diffusers-sparse3d {' '.join(words or argv[:1])}: {explain(error, argv)}", file=sys.stderr)
        return 1


def run_program() -> None:
    """
    Runs the command of the process, and ends it: the program `diffusers-sparse3d`.

    After a command that is no training, and what others registered for the end, the process ends at once: to take
    apart a million objects of imported modules one by one would keep the user waiting for another second.
    """
    status = main()
    if library_command(sys.argv[1:]) is None:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
