"""Results of operators that gradient checkpointing keeps in the forward pass, and takes again in the backward pass.

Checkpointing computes a block a second time, and with it operators that take long and whose results are small. Which
these are, operators say (`operator(..., kept_by_checkpoints=True)`); whether they are kept, a `KeptResults` that the
checkpoint is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


# Computes a function of arguments, or takes its results from elsewhere.
Compute = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
_compute: ContextVar[Compute | None] = ContextVar("compute", default=None)


def computed_or_kept(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """`function(*arguments)`, which the `KeptResults` of this context, if there is one, keeps or has kept."""
    compute = _compute.get()
    return function(*arguments) if compute is None else compute(function, arguments)


class KeptResults:
    """The results of operators in one forward pass.

    They are kept as long as this object, which a checkpoint holds until its backward pass is over.
    """

    def __init__(self) -> None:
        self._results: list[tuple[Callable[..., Any], Any]] = []

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What `context_fn` of `torch.utils.checkpoint` returns: where results are kept, and where they are taken."""
        return _Computing(lambda: self._keep), _Computing(self._taking)

    def __len__(self) -> int:
        return len(self._results)

    def _keep(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        results = function(*arguments)
        self._results.append((function, _detached(results)))
        return results

    def _taking(self) -> Compute:
        """What gives the results again, from the first on."""
        results = iter(self._results)

        def take(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            kept, result = next(results, (None, None))
            if kept is not function:
                raise RuntimeError(
                    "The second forward pass of a checkpoint must call the same operators as the first, got"
                    f" {function.__qualname__} where there was {getattr(kept, '__qualname__', 'none')}"
                )
            return _detached(result)

        return take


class _Computing(AbstractContextManager[None]):
    """A context with a `Compute`, which is made anew each time that it is entered."""

    def __init__(self, make: Callable[[], Compute]):
        self._make = make
        self._tokens: list[Token[Compute | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_compute.set(self._make()))

    def __exit__(self, *_: object) -> None:
        _compute.reset(self._tokens.pop())


def _detached(results: Any) -> Any:
    """The same numbers as tensors of their own: autograd marks those that a function returns as its results."""
    return tree_map(lambda result: result.detach() if isinstance(result, Tensor) else result, results)
