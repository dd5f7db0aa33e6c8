"""Calls caught on their way to a kernel, as the op table sees them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cost_model.ops import OpCall, Ref
from cost_model.tensor import TensorMeta

_WRAPPING_LISTS = frozenset(f"_foreach_{op}{mark}" for op in ("add", "sub", "mul", "div") for mark in ("", "_"))
"""List ops whose loop on the CPU turns its numbers into tensors (ATen/native/ForeachOpsKernels.cpp)."""
_TENSOR, _TENSORS = "Tensor", "List[Tensor]"
_DTYPE_OF_NUMBER = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class AtenCall:
    """A dispatched call, read once: its arguments by name and the tensors among them in schema order."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        self.func, self.result = func, result
        self._args, self._kwargs = args, kwargs
        self.tensors: list[Tensor] = []
        self.is_list = any(kind == _TENSORS for _, _, kind in _signature(func))
        self._numbers: list[Any] = []
        self._arguments: dict[str, object] = {}
        for position, (name, default, kind) in enumerate(_signature(func)):
            value = args[position] if position < len(args) else kwargs.get(name, default)
            if kind == _TENSOR and isinstance(value, bool | int | float | complex):
                self._numbers.append(value)
            self._arguments[name] = self._referred(value)

    def op_call(self) -> OpCall:
        """As the op table sees it."""
        inputs, outputs = ([_meta(tensor) for tensor in tensors] for tensors in (self.tensors, tensors_in(self.result)))
        return OpCall(str(self.func), tuple(inputs), tuple(outputs), self._arguments)

    def places(self) -> list[list[Tensor]]:
        """For an op over lists, the tensors at each place in them; none where its lists differ in length."""
        lists = [v for v in (*self._args, *self._kwargs.values()) if _is_tensors(v)]
        return [list(place) for place in zip(*lists, strict=True)] if len({len(v) for v in lists}) == 1 else []

    def part(self, places: Sequence[int]) -> OpCall:
        """As the op table would see it for some places in its lists."""

        def taken(value: Any) -> Any:
            return [value[place] for place in places] if isinstance(value, list | tuple) and value else value

        args, kwargs = [taken(v) for v in self._args], {name: taken(v) for name, v in self._kwargs.items()}
        return AtenCall(self.func, args, kwargs, taken(self.result)).op_call()

    def number_bytes(self) -> int:
        """Bytes of the tensor a number becomes while the op runs, and of its copy in the dtype the op works in."""
        numbers = self._numbers or self._list_numbers()
        return max((_number_bytes(number, tensor.dtype) for number in numbers for tensor in self.tensors), default=0)

    def _list_numbers(self) -> list[Any]:
        if self.func._opname not in _WRAPPING_LISTS:
            return []
        found = self._arguments.get("scalar", self._arguments.get("scalars"))
        return [] if found is None else [found[0] if isinstance(found, list) else found]

    def _referred(self, value: Any) -> object:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return Ref(len(self.tensors) - 1)
        if isinstance(value, list | tuple):
            return [self._referred(item) for item in value]
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, Tensor) for item in value)


@functools.cache
def _signature(func: Any) -> tuple[tuple[str, Any, str], ...]:
    """Name, default and type of each argument in order."""
    return tuple((a.name, a.default_value, str(a.type)) for a in func._schema.arguments)


def _number_bytes(number: bool | int | float | complex, dtype: torch.dtype) -> int:
    own = _DTYPE_OF_NUMBER[type(number)]
    return own.itemsize + (0 if own == dtype else dtype.itemsize)


def _meta(tensor: Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
