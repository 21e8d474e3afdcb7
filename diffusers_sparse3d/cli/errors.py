"""The one place that turns errors into the sentence that the command line prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence


# Types whose message was written for whoever called: it says all.
TOLD = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
MORE_MEMORY = {
    "generate": "`--low-memory`, `--dtype bfloat16` or a lower `--resolution`",
    "app": "`--low-memory`, `--dtype bfloat16` or a lower resolution",
    "encode": "a lower `--resolution` or `--device cpu`",
    "decode": "`--device cpu`",
    "train": "smaller batches, a lower `max_tokens` or gradient checkpointing (docs/training.md)",
}


def out_of_memory(error: BaseException) -> str | None:
    """Which memory an error says is exhausted, "GPU memory" or "memory"; None for other errors."""
    if isinstance(error, MemoryError):
        return "memory"
    if not isinstance(error, RuntimeError) or "torch" not in sys.modules:
        return None
    if isinstance(error, sys.modules["torch"].OutOfMemoryError) or "CUDA out of memory" in str(error):
        return "GPU memory"
    # PyTorch's allocator on the CPU has no class of its own.
    return "memory" if "not enough memory" in str(error) or "can't allocate memory" in str(error) else None


def explain(error: BaseException, argv: Sequence[str]) -> str:
    """
    What is said of an error: one sentence, without a traceback.

    Args:
        error: what was raised.
        argv: the words of the command line, whose first names the command.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    memory = out_of_memory(error)
    if memory is not None:
        advice = MORE_MEMORY.get(argv[0] if argv else "", "a smaller input")
        return f"out of {memory}; {advice} takes less"
    message = " ".join(str(error).split())
    if isinstance(error, TOLD) and message:
        return message
    return f"{type(error).__name__}{f': {message}' if message else ''} (`--debug` shows where)"
