"""
The command line `diffusers-sparse3d`: pipelines and VAEs on files, the web app, training and its tools, conversion.

- `parser.py`: all commands and their arguments.
- `errors.py`: what is said of an error.
- `pictures.py`, `outputs.py`: which files a command reads and writes, checked before any work.
- `generate.py`, `latents.py`, `information.py`, `view.py`: the commands.

Nothing heavy is imported here, so that the help appears at once: each command imports what it needs.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

from .errors import explain
from .parser import LIBRARY_COMMANDS, make_parser


__all__ = ["LIBRARY_COMMANDS", "main", "make_parser"]


def run_library_command(words: tuple[str, ...], arguments: Sequence[str]) -> None:
    """Runs a command of `LIBRARY_COMMANDS` with the arguments after its words."""
    module = import_module(f"..{LIBRARY_COMMANDS[words][0]}", __package__)
    module.main(arguments, prog=" ".join(("diffusers-sparse3d", *words)))


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
    words = next((words for words in LIBRARY_COMMANDS if tuple(argv[: len(words)]) == words), None)
    try:
        if words is not None:
            run_library_command(words, argv[len(words) :])
            return 0
        args = make_parser().parse_args(argv)
        with collecting_rarely():
            command = import_module(f".{args.module}", __package__)
            return int(getattr(command, args.function)(args) or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        print(f"diffusers-sparse3d {' '.join(words or argv[:1])}: {explain(error, argv)}", file=sys.stderr)
        return 1
