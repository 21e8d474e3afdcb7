"""Recorded calls: functions that launch many small kernels are recorded once and then repeated as lists of launches.

Which kernels such a function launches, and with which numbers, depends on the shapes of its inputs and on plans that
live as long as the recording. To find this out again takes Python longer than the GPU works for a few thousand tokens.
`RepeatedCalls` therefore records a call: the kernels and operations of PyTorch in their order, their numbers, and for
each pointer the buffer that it points into. A buffer is an input of the call or memory that the call allocates. To
repeat the call for other inputs, its buffers are allocated anew and the list is worked off.

Unlike a CUDA graph, a recorded call keeps no memory between calls and copies no inputs, and it can be repeated on any
stream, in several threads at once, and while a CUDA graph is being captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .collection import current_collector
from .dispatch import cdiv, is_on_current_device
from .launch import current_stream, launches_directly, listening
from .settings import current_settings


# The most bytes of scratch memory with which a call is repeated. Larger calls gain little from repeating, and a
# repeated call frees its scratch memory only at its end.
_MOST_SCRATCH = 1 << 28
# The fewest bytes of inputs, by what tells functions apart, with which a recording needed too much scratch memory.
# That is known only after it, and each batch of a training has a plan of its own: its calls would be recorded in vain.
_too_large: dict[Hashable, int] = {}
# Buffers in the scratch memory start at multiples of so many bytes, as the allocator's own blocks do.
_ALIGNMENT = 512
# The operations that allocate memory and write nothing to it.
_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
)


@dataclass(frozen=True)
class _View:
    """A tensor that is all or a part of a buffer, described without the tensor.

    Attributes:
        buffer: the number of the buffer.
        shape, stride: as in `torch.as_strided`.
        offset: elements between the start of the buffer and the start of the tensor.
        whole: whether the tensor is the buffer itself, with its shape and strides.
    """

    buffer: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    whole: bool

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        """The tensor, given the buffers of a repeated call."""
        buffer = buffers[self.buffer]
        if self.whole:
            return buffer
        return buffer.as_strided(self.shape, self.stride, buffer.storage_offset() + self.offset)


class _Launch(NamedTuple):
    """A launch of a compiled kernel.

    Attributes:
        launch: the compiled kernel, bound to its grid.
        arguments: makes all arguments of the kernel from the addresses of the buffers. Pointers are integers, and
            aggregates plain tuples.
    """

    launch: Callable[..., None]
    arguments: Callable[[Sequence[int]], tuple[Any, ...]]


class _Operation(NamedTuple):
    """A call of an operation of PyTorch.

    Attributes:
        function: the operation.
        arguments, settings: its arguments by position and by name, a `_View` in place of each tensor in a buffer.
        made: for each result the number of the buffer that it becomes, None if it lies in a buffer already.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    settings: dict[str, Any]
    made: list[int | None]


class _NotRepeatableError(Exception):
    """A call cannot be recorded, because it did something that a list of launches does not hold."""


class _TooLargeError(_NotRepeatableError):
    """A call cannot be recorded, because it needs too much scratch memory."""


class _Recorder(TorchDispatchMode):
    """A mode that records the launches and the operations of PyTorch while it is entered.

    Args:
        inputs: the tensors that the recorded function takes; the first buffers.

    Attributes:
        num_inputs: the number of inputs.
        buffers: the inputs and all that was allocated. Tensors are kept, so that no address is used twice.
        constants: tensors that are neither, and that a repeated call uses again.
        steps: the recorded launches and operations in order.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.num_inputs = len(inputs)
        self.buffers = list(inputs)
        self.constants: list[Tensor] = []
        self.steps: list[_Launch | _Operation] = []
        # The numbers of inputs by the addresses of their first elements, and the addresses of their storage.
        self._inputs = {tensor.data_ptr(): number for number, tensor in reversed([*enumerate(inputs)])}
        self._input_storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        # The numbers of allocated buffers by the addresses of their storage.
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operation and record it, unless a repeated call need not do it: allocations and views."""
        settings = kwargs or {}
        result = function(*args, **settings)
        results = (result,) if isinstance(result, Tensor) else result
        if not isinstance(results, (tuple, list)) or not all(isinstance(tensor, Tensor) for tensor in results):
            # The function may decide by the value what it launches.
            raise _NotRepeatableError
        made = [self._add(tensor) if self._number_of(tensor) is None else None for tensor in results]
        makes = any(number is not None for number in made)
        if function._schema.is_mutable or (makes and function not in _ALLOCATIONS):
            named = {name: self._described(setting) for name, setting in settings.items()}
            described = [self._described(argument) for argument in args]
            self.steps.append(_Operation(function, described, named, made))
        return result

    def listen(self, launch: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
        """Record a launch; a `launch.Listener`."""
        if launch is None:
            raise _NotRepeatableError
        # An expression that Python compiles once takes a quarter of the time of a loop over all arguments.
        values: list[Any] = []
        expression = self._expression(arguments, values)
        self.steps.append(_Launch(launch, _compiled(expression)(values)))

    def view_of(self, tensor: Tensor) -> _View | Tensor:
        """The place of a tensor in a buffer; a constant, which lies in no buffer, is returned itself."""
        number = self._number_of(tensor)
        if number is None:
            return self._constant(tensor)
        buffer = self.buffers[number]
        offset, rest = divmod(tensor.data_ptr() - buffer.data_ptr(), tensor.itemsize)
        if rest or tensor.dtype != buffer.dtype:
            raise _NotRepeatableError
        whole = not offset and tensor.shape == buffer.shape and tensor.stride() == buffer.stride()
        return _View(number, tensor.shape, tensor.stride(), offset, whole)

    def _add(self, tensor: Tensor) -> int:
        """Make a new tensor a buffer; returns its number."""
        number = len(self.buffers)
        self.buffers.append(tensor)
        self._numbers[self._storage_of(tensor)] = number
        return number

    def _storage_of(self, tensor: Tensor) -> int:
        """The address of the storage of a tensor.

        Raises:
            _NotRepeatableError: if it is the storage of an input. In another call inputs may share memory in another
                way, so a part of an input is known only if it starts where the input starts.
        """
        storage = tensor.untyped_storage().data_ptr()
        if storage in self._input_storages:
            raise _NotRepeatableError
        return storage

    def _number_of(self, tensor: Tensor) -> int | None:
        """The number of the buffer that a tensor lies in, None if it lies in none."""
        # Not by their storage: inputs may be parts of one tensor in this call and of several in another.
        number = self._inputs.get(tensor.data_ptr())
        return self._numbers.get(tensor.untyped_storage().data_ptr()) if number is None else number

    def _expression(self, arguments: tuple[Any, ...], values: list[Any]) -> str:
        """A tuple of arguments as an expression of Python, in `pointers`, the addresses of the buffers, and `values`.

        It holds no numbers but those of buffers, so that launches of a kernel in other recordings have the same one.

        Args:
            arguments: of a launch, or the fields of an aggregate.
            values: gets what is the same in every call: numbers, constants, aggregates of these.
        """
        parts: list[str] = []

        def add_value(value: Any, prefix: str = "") -> None:
            parts.append(f"{prefix}values[{len(values)}]")
            values.append(value)

        for argument in arguments:
            if isinstance(argument, tuple) and _holds_tensors(argument):
                parts.append(self._expression(argument, values))
            elif not isinstance(argument, Tensor):
                add_value(argument)
            else:
                number = self._number_of(argument)
                if number is None:
                    add_value(self._constant(argument).data_ptr())
                elif offset := argument.data_ptr() - self.buffers[number].data_ptr():
                    add_value(offset, f"pointers[{number}] + ")
                else:
                    parts.append(f"pointers[{number}]")
        return f"({', '.join(parts)},)" if parts else "()"

    def _described(self, argument: Any) -> Any:
        """An argument of an operation, as `_Operation` has it."""
        if isinstance(argument, (list, tuple)) and any(isinstance(part, Tensor) for part in argument):
            raise _NotRepeatableError
        return self.view_of(argument) if isinstance(argument, Tensor) else argument

    def _constant(self, tensor: Tensor) -> Tensor:
        """Keep a tensor that lies in no buffer."""
        self._storage_of(tensor)
        self.constants.append(tensor)
        return tensor


class _RecordedCall:
    """A recorded call of a function, for other tensors with the same shapes, dtypes, strides and alignment.

    Args:
        recorder: the recorder after the call.
        results: what the function returned.

    Raises:
        _TooLargeError: if the call needs too much scratch memory.
        _NotRepeatableError: if it needs a buffer with gaps.
    """

    def __init__(self, recorder: _Recorder, results: Sequence[Tensor]):
        self._steps, self._constants = recorder.steps, recorder.constants
        self._results = [recorder.view_of(result) for result in results]
        operations = [step for step in self._steps if isinstance(step, _Operation)]
        made = {number for step in operations for number in step.made}
        views: list[Any] = [*self._results]
        for step in operations:
            views += [*step.arguments, *step.settings.values()]
        seen_as_tensors = {view.buffer for view in views if type(view) is _View}
        self._num_buffers, self._scratch_bytes = len(recorder.buffers), 0
        # Buffers that operations or the caller see: number, shape and dtype.
        self._allocated: list[tuple[int, torch.Size, torch.dtype]] = []
        # Buffers that only kernels see share one allocation: number and bytes from its start.
        self._scratch: list[tuple[int, int]] = []
        for number in range(recorder.num_inputs, self._num_buffers):
            buffer = recorder.buffers[number]
            if number in made:
                continue
            if number in seen_as_tensors:
                if not buffer.is_contiguous():
                    raise _NotRepeatableError
                self._allocated.append((number, buffer.shape, buffer.dtype))
            else:
                self._scratch.append((number, self._scratch_bytes))
                self._scratch_bytes += cdiv(buffer.untyped_storage().nbytes(), _ALIGNMENT) * _ALIGNMENT
        if self._scratch_bytes > _MOST_SCRATCH:
            raise _TooLargeError

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Repeat the call on the current stream; returns the results."""
        first = inputs[0]
        stream = current_stream(first)
        missing = self._num_buffers - len(inputs)
        scratch = first.new_empty(self._scratch_bytes, dtype=torch.uint8)
        start = scratch.data_ptr()
        # Buffers that only kernels see need a pointer alone.
        buffers = [*inputs, *(scratch,) * missing]
        pointers = [*(tensor.data_ptr() for tensor in inputs), *(start,) * missing]
        for number, offset in self._scratch:
            pointers[number] = start + offset
        for number, shape, dtype in self._allocated:
            buffers[number] = buffer = first.new_empty(shape, dtype=dtype)
            pointers[number] = buffer.data_ptr()
        for step in self._steps:
            if isinstance(step, _Launch):
                step.launch(*step.arguments(pointers), stream=stream)
            else:
                _operate(step, buffers, pointers)
        return tuple(view.of(buffers) if isinstance(view, _View) else view for view in self._results)


@functools.lru_cache(maxsize=1024)
def _compiled(expression: str) -> Callable[[list[Any]], Callable[[Sequence[int]], tuple[Any, ...]]]:
    """A function of `values` that makes a function of `pointers` of an expression in both."""
    return eval(f"lambda values: lambda pointers: {expression}")


def _holds_tensors(aggregate: tuple[Any, ...]) -> bool:
    """Whether a field of an aggregate, or of one in it, is a tensor."""
    return any(
        isinstance(field, Tensor) or (isinstance(field, tuple) and _holds_tensors(field)) for field in aggregate
    )


def _operate(step: _Operation, buffers: list[Tensor], pointers: list[int]) -> None:
    """Repeat an operation; its new results become buffers."""
    arguments = [part.of(buffers) if type(part) is _View else part for part in step.arguments]
    settings = {name: part.of(buffers) if type(part) is _View else part for name, part in step.settings.items()}
    result = step.function(*arguments, **settings)
    for number, tensor in zip(step.made, (result,) if isinstance(result, Tensor) else result):
        if number is not None:
            buffers[number], pointers[number] = tensor, tensor.data_ptr()


def _description(tensor: Tensor) -> tuple[Any, ...]:
    """The properties of an input on which launches may depend."""
    layout = tensor.is_contiguous() or tensor.stride()
    return tensor.shape, tensor.dtype, layout, tensor.data_ptr() % 16 == 0


class RepeatedCalls:
    """Calls of functions of tensors on a GPU: the first runs as it is, the second is recorded, all others repeat it.

    It is for functions that launch kernels and allocate the memory that these write to, and whose launches depend on
    nothing else than settings, the shapes, dtypes, strides and alignment of their inputs, and objects that live as
    long as this one. A function that reads a value back, or does something else that a list of launches does not hold,
    is called as it is.
    """

    def __init__(self) -> None:
        # The recorded calls; True for a function that was called once, False for one that cannot be recorded.
        self._calls: dict[Hashable, _RecordedCall | bool] = {}

    def __call__(
        self, function: Callable[..., Sequence[Tensor]], tensors: tuple[Tensor, ...], **settings: Hashable
    ) -> Sequence[Tensor]:
        """`function(*tensors)`, called or repeated.

        Args:
            function: takes tensors and returns tensors, see the class. It is made anew for each call, so `settings`
                tell functions apart.
            tensors: inputs, contiguous or not, none of them empty.
            settings: the name of the function, and the values of everything but the tensors on which it depends.
        """
        first = tensors[0]
        repeats = first.is_cuda and is_on_current_device(first) and current_settings().recording
        if not repeats or not launches_directly() or current_collector() is not None:
            return function(*tensors)
        function_key, size = (first.get_device(), *settings.items()), sum(tensor.nbytes for tensor in tensors)
        if size >= _too_large.get(function_key, size + 1):
            return function(*tensors)
        key = (function_key, *map(_description, tensors))
        call = self._calls.get(key)
        if call is None:
            # Kernels are compiled by this call, which the recorder does not see.
            self._calls[key] = True
            return function(*tensors)
        if call is True:
            try:
                return self._record(key, function, tensors)
            except _NotRepeatableError as error:
                self._calls[key] = False
                if isinstance(error, _TooLargeError):
                    _too_large[function_key] = min(size, _too_large.get(function_key, size))
                return function(*tensors)
        return call(tensors) if call else function(*tensors)

    def _record(
        self, key: Hashable, function: Callable[..., Sequence[Tensor]], tensors: tuple[Tensor, ...]
    ) -> Sequence[Tensor]:
        """Call a function and keep the recorded call under the key.

        Raises:
            _NotRepeatableError: if it cannot be recorded; it was called in vain then.
        """
        if len({tensor.data_ptr() for tensor in tensors}) < len(tensors):
            # Two inputs are one tensor. The call is recorded when they are two, as in other calls they may be.
            return function(*tensors)
        recorder = _Recorder(tensors)
        with recorder, listening(recorder.listen):
            results = function(*tensors)
        self._calls[key] = _RecordedCall(recorder, results)
        return results
