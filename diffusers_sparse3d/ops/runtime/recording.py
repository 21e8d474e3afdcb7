"""Functions of many small kernels, called again and again for the same coordinates: repeated as lists of launches.

What a call launches depends on shapes and plans alone. To find it out again takes Python longer than the GPU takes for
a few thousand tokens. So it is recorded once: which kernels, with which numbers, and where each pointer comes from. To
repeat it, memory is allocated as ever, and the list is gone through. Unlike a CUDA graph this keeps no memory, copies
nothing, and may run on any stream, in several threads, and while something else is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import cdiv, is_on_current_device
from .launch import current_stream, listening


# Bytes of scratch memory up to which calls are repeated. Beyond it, it matters that memory is freed between kernels,
# which a list does not do, and it no longer matters how long launches take.
_MOST_SCRATCH = 1 << 28
# What buffers in the scratch memory start at multiples of, as memory of their own does.
_ALIGNMENT = 512
_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
)


@dataclass(frozen=True)
class _View:
    """A tensor in a buffer.

    Attributes:
        buffer: its number.
        shape, stride: as of `torch.as_strided`.
        offset: elements from the start of the buffer.
        whole: whether it is all of the buffer, as it was made.
    """

    buffer: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    whole: bool

    def of(self, buffers: Sequence[Tensor | None]) -> Tensor:
        buffer = buffers[self.buffer]
        if self.whole:
            return buffer
        return buffer.as_strided(self.shape, self.stride, buffer.storage_offset() + self.offset)


# Positions of the pointers into buffers among the arguments of a launch, each with the number of its buffer; for an
# aggregate that holds pointers, its position with the places among its fields.
_Places = list[tuple[int, "int | _Places"]]


class _Launch(NamedTuple):
    """A launch of a compiled kernel for a grid.

    Attributes:
        launch: the compiled kernel.
        arguments: all arguments; a pointer into a buffer is given as bytes from the start of that buffer. Aggregates
            that hold such pointers are lists.
        places: the pointers into buffers.
    """

    launch: Callable[..., None]
    arguments: list[Any]
    places: _Places


def _with_pointers(arguments: list[Any], places: _Places, pointers: Sequence[int]) -> list[Any]:
    """A copy of recorded arguments with addresses in place of the bytes from the starts of buffers."""
    arguments = arguments.copy()
    for position, place in places:
        if type(place) is int:
            arguments[position] += pointers[place]
        else:
            arguments[position] = tuple(_with_pointers(arguments[position], place, pointers))
    return arguments


class _Operation(NamedTuple):
    """A function of PyTorch, with a `_View` for each tensor.

    Attributes:
        function: what is called.
        arguments, settings: with what, by position and by name.
        made: numbers of the buffers that its results are; None for a result that is in one.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    settings: dict[str, Any]
    made: list[int | None]


class _NotRepeatableError(Exception):
    """Something was done that a list cannot tell."""


class _Recorder(TorchDispatchMode):
    """What happens while it is entered. Buffers are the inputs, and then what is allocated."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.num_inputs = len(inputs)
        # Tensors are kept, so that no address is used twice.
        self.buffers = list(inputs)
        self.constants: list[Tensor] = []
        self.steps: list[_Launch | _Operation] = []
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), settings: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(settings or {}))
        results = (result,) if isinstance(result, Tensor) else result
        if not isinstance(results, (tuple, list)) or not all(isinstance(tensor, Tensor) for tensor in results):
            # It may decide on something.
            raise _NotRepeatableError
        made = [self._add(tensor) if self._number_of(tensor) is None else None for tensor in results]
        makes = any(number is not None for number in made)
        if function._schema.is_mutable or (makes and function not in _ALLOCATIONS):
            named = {name: self._described(setting) for name, setting in (settings or {}).items()}
            described = [self._described(argument) for argument in arguments]
            self.steps.append(_Operation(function, described, named, made))
        return result

    def listen(self, launch: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
        """To launches, see `launch.listening`."""
        if launch is None:
            raise _NotRepeatableError
        self.steps.append(_Launch(launch, *self._placed(arguments)))

    def _placed(self, arguments: tuple[Any, ...]) -> tuple[list[Any], _Places]:
        """Arguments of a launch and the places of pointers among them, as in `_Launch`."""
        values: list[Any] = list(arguments)
        places: _Places = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                number = self._number_of(argument)
                if number is None:
                    values[position] = self._constant(argument).data_ptr()
                else:
                    values[position] = argument.data_ptr() - self.buffers[number].data_ptr()
                    places.append((position, number))
            elif isinstance(argument, tuple):
                fields, places_of_fields = self._placed(argument)
                values[position] = fields if places_of_fields else tuple(fields)
                if places_of_fields:
                    places.append((position, places_of_fields))
        return values, places

    def view_of(self, tensor: Tensor) -> _View | Tensor:
        """Where a tensor is; what was there before is what it is."""
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
        number = len(self.buffers)
        self.buffers.append(tensor)
        self._numbers[self._memory_of(tensor)] = number
        return number

    def _memory_of(self, tensor: Tensor) -> int:
        """What tells tensors apart. Parts of an input have no place: inputs may share memory in other ways then."""
        memory = tensor.untyped_storage().data_ptr()
        if any(memory == given.untyped_storage().data_ptr() for given in self.buffers[: self.num_inputs]):
            raise _NotRepeatableError
        return memory

    def _number_of(self, tensor: Tensor) -> int | None:
        for number, given in enumerate(self.buffers[: self.num_inputs]):
            # Not by their memory: inputs may be parts of one tensor now, and of several later.
            if given.data_ptr() == tensor.data_ptr():
                return number
        return self._numbers.get(tensor.untyped_storage().data_ptr())

    def _described(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)) and any(isinstance(part, Tensor) for part in argument):
            raise _NotRepeatableError
        return self.view_of(argument) if isinstance(argument, Tensor) else argument

    def _constant(self, tensor: Tensor) -> Tensor:
        self._memory_of(tensor)
        self.constants.append(tensor)
        return tensor


class _LaunchList:
    """A recorded call of a function, for other tensors with the same shapes, dtypes, strides and alignment.

    Args:
        recorder: after the call.
        results: of the call.

    Raises:
        _NotRepeatableError: if it takes too much memory, or something in it is not as it has to be.
    """

    def __init__(self, recorder: _Recorder, results: Sequence[Tensor]):
        self._steps, self._constants = recorder.steps, recorder.constants
        self._results = [recorder.view_of(result) for result in results]
        operations = [step for step in self._steps if type(step) is _Operation]
        made = {number for step in operations for number in step.made}
        views = [*self._results]
        for step in operations:
            views += [*step.arguments, *step.settings.values()]
        tensors = {view.buffer for view in views if type(view) is _View}
        # What only kernels see shares one allocation.
        self._num_buffers, self._scratch_bytes = len(recorder.buffers), 0
        self._allocated: list[tuple[int, torch.Size, torch.dtype]] = []
        self._scratch: list[tuple[int, int]] = []
        for number in range(recorder.num_inputs, self._num_buffers):
            buffer = recorder.buffers[number]
            if number in made:
                continue
            if number in tensors:
                if not buffer.is_contiguous():
                    raise _NotRepeatableError
                self._allocated.append((number, buffer.shape, buffer.dtype))
            else:
                self._scratch.append((number, self._scratch_bytes))
                self._scratch_bytes += cdiv(buffer.untyped_storage().nbytes(), _ALIGNMENT) * _ALIGNMENT
        if self._scratch_bytes > _MOST_SCRATCH:
            raise _NotRepeatableError

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        first = inputs[0]
        stream = current_stream(first)
        missing = self._num_buffers - len(inputs)
        buffers: list[Tensor | None] = [*inputs, *(None,) * missing]
        pointers = [*(tensor.data_ptr() for tensor in inputs), *(0,) * missing]
        scratch = first.new_empty(self._scratch_bytes, dtype=torch.uint8)
        start = scratch.data_ptr()
        for number, offset in self._scratch:
            pointers[number] = start + offset
        for number, shape, dtype in self._allocated:
            buffers[number] = buffer = first.new_empty(shape, dtype=dtype)
            pointers[number] = buffer.data_ptr()
        for step in self._steps:
            if type(step) is _Launch:
                step.launch(*_with_pointers(step.arguments, step.places, pointers), stream=stream)
            else:
                _operate(step, buffers, pointers)
        return tuple(view.of(buffers) if type(view) is _View else view for view in self._results)


def _operate(step: _Operation, buffers: list[Tensor | None], pointers: list[int]) -> None:
    arguments = [part.of(buffers) if type(part) is _View else part for part in step.arguments]
    settings = {name: part.of(buffers) if type(part) is _View else part for name, part in step.settings.items()}
    result = step.function(*arguments, **settings)
    for number, tensor in zip(step.made, (result,) if isinstance(result, Tensor) else result):
        if number is not None:
            buffers[number], pointers[number] = tensor, tensor.data_ptr()


def _description(tensor: Tensor) -> tuple[Any, ...]:
    """What launches may depend on."""
    layout = tensor.is_contiguous() or tensor.stride()
    return tensor.shape, tensor.dtype, layout, tensor.data_ptr() % 16 == 0


class RepeatedCalls:
    """Calls of functions of tensors on a GPU: the first as it is, the second recorded, the others repeated.

    It is for functions that launch kernels and allocate what these write, where nothing else than settings, shapes and
    what lives as long as this object decides on the launches.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, _LaunchList | bool] = {}

    def __call__(
        self, settings: tuple[Hashable, ...], function: Callable[..., Sequence[Tensor]], tensors: tuple[Tensor, ...]
    ) -> Sequence[Tensor]:
        """`function(*tensors)`.

        Args:
            settings: which function it is, and all but its tensors.
            function: see above.
            tensors: contiguous or not, none of them empty.
        """
        if not tensors[0].is_cuda or not is_on_current_device(tensors[0]):
            return function(*tensors)
        key = (settings, *map(_description, tensors))
        call = self._calls.get(key)
        if call is None:
            # Kernels are compiled.
            self._calls[key] = True
            return function(*tensors)
        if call is True:
            return self._record(key, function, tensors)
        return call(tensors) if call else function(*tensors)

    def _record(
        self, key: Hashable, function: Callable[..., Sequence[Tensor]], tensors: tuple[Tensor, ...]
    ) -> Sequence[Tensor]:
        if len({tensor.data_ptr() for tensor in tensors}) < len(tensors):
            # One tensor given twice: recorded when there are two.
            return function(*tensors)
        recorder = _Recorder(tensors)
        try:
            with recorder, listening(recorder.listen):
                results = function(*tensors)
            self._calls[key] = _LaunchList(recorder, results)
        except _NotRepeatableError:
            self._calls[key] = False
            return function(*tensors)
        return results
