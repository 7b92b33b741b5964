"""A CUDA graph, as near as a CPU comes: the operators of a pass, recorded once and run again on the same memory.

A capture refuses what a CUDA graph refuses: values that Python reads, shapes that depend on values, memory of the
host, and memory that moves; where asked to, also operators whose code nothing has loaded before. A replay runs the
recorded operators and no Python of the pass; a tensor that the pass made is made again in the same place, as in a
graph's memory pool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


class CaptureError(RuntimeError):
    """Something that cannot be in a graph."""


@dataclass(frozen=True, slots=True)
class _Call:
    operator: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    made: tuple[tuple[int, torch.Tensor], ...]


class Graph:
    """A captured pass."""

    def __init__(self, calls: list[_Call], output: Any) -> None:
        self._calls = calls
        self.output = output

    def replay(self) -> None:
        """Runs the operators again on what their memory holds now."""
        with torch.inference_mode():
            for call in self._calls:
                results = tree_flatten(call.operator(*call.arguments, **call.named))[0]
                for position, place in call.made:
                    place.copy_(results[position])

    @property
    def operators(self) -> list[str]:
        """Names of the operators, in order."""
        return [str(call.operator) for call in self._calls]


_capturing: list[_Capture] = []


def capturing() -> bool:
    """Whether a pass is being captured: `torch.cuda.is_current_stream_capturing`."""
    return bool(_capturing)


# An operator with the dtypes of the tensors that it was given: the code that a GPU loads at its first call.
Kernel = tuple[str, tuple[torch.dtype, ...]]


def kernels_of(run: Callable[[], Any]) -> set[Kernel]:
    """What a pass in Python, such as a warm-up, has loaded."""
    mode = _Loading()
    with torch.inference_mode(), mode:
        run()
    return mode.kernels


def _kernel(func: Any, values: object) -> Kernel:
    return str(func), tuple(each.dtype for each in tree_flatten(values)[0] if isinstance(each, torch.Tensor))


def _is_number(index: torch.Tensor | None) -> bool:
    return index is None or index.dtype not in (torch.bool, torch.uint8)


class _Loading(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[Kernel] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels.add(_kernel(func, (args, kwargs)))
        return func(*args, **(kwargs or {}))


def capture(run: Callable[[], Any], on_device: object, loaded: set[Kernel] | None = None) -> Graph:
    """Captures a pass.

    Args:
        run: The pass.
        on_device: What holds the tensors that stay where they are: its inputs, its weights, the recorders.
        loaded: Kernels that passes before have loaded; None takes all as loaded.

    Raises:
        CaptureError: It does what a graph cannot repeat.
    """
    mode = _Capture({tensor.untyped_storage().data_ptr() for tensor in tensors_of(on_device)}, loaded)
    _capturing.append(mode)
    try:
        with torch.inference_mode(), _no_reads(), mode:
            output = run()
    finally:
        _capturing.pop()
    return Graph(mode.calls, output)


def tensors_of(value: object, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, however deep."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each, seen)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from tensors_of(each, seen)
    elif callable(value) and getattr(value, "__closure__", None):
        for cell in value.__closure__ or ():  # type: ignore[attr-defined]
            yield from tensors_of(cell.cell_contents, seen)
    elif type(value).__module__.startswith(("reap_serve", "test_", "fake_")) or is_dataclass(value):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        for name in (*slots, *getattr(value, "__dict__", ())):
            yield from tensors_of(getattr(value, name, None), seen)


class _Capture(TorchDispatchMode):
    def __init__(self, storages: set[int], loaded: set[Kernel] | None) -> None:
        super().__init__()
        self._loaded = loaded
        self.calls: list[_Call] = []
        self._storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        launches = func is not torch.ops.aten.detach.default
        if launches and self._loaded is not None and _kernel(func, (args, kwargs)) not in self._loaded:
            raise CaptureError(f"{func} was never called before")
        dynamic = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        # An index of numbers has a shape of its own; one of truth values has as many rows as are true.
        if dynamic and not (func is torch.ops.aten.index.Tensor and all(_is_number(each) for each in args[1])):
            raise CaptureError(f"{func} depends on values")
        if func in (torch.ops.aten.resize_.default, torch.ops.aten.set_.source_Tensor):
            raise CaptureError(f"{func} moves memory")
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        for tensor in given:
            # A number that an operator widens is a constant of the graph.
            constant = tensor.dim() == 0 and func is torch.ops.aten.lift_fresh.default
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in self._storages and not constant:
                raise CaptureError(f"{func} takes memory of the host")
        places = [(tensor.data_ptr(), tensor.shape) for tensor in given]
        result = func(*args, **kwargs)
        if places != [(tensor.data_ptr(), tensor.shape) for tensor in given]:
            raise CaptureError(f"{func} allocates for its output")
        flat = tree_flatten(result)[0]
        made = []
        for position, tensor in enumerate(flat):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._storages:
                made.append((position, tensor))
                self._storages.add(tensor.untyped_storage().data_ptr())
        keep = tree_map(lambda each: each.detach() if isinstance(each, torch.Tensor) else each, (args, kwargs))
        self.calls.append(_Call(func, keep[0], keep[1], tuple(made)))
        return result


@contextlib.contextmanager
def _no_reads() -> Iterator[None]:
    def refused(name: str) -> Callable[..., Any]:
        def read(*arguments: Any, **named: Any) -> Any:
            raise CaptureError(f"Tensor.{name} waits for the device")

        return read

    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(patch.object(torch.Tensor, name, refused(name)))
        yield
