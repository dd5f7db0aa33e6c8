"""What the ops of a calibration are called on, and how ops of autopar's own are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from autopar.calibrate_worker import COLD_BYTES

Tensor: TypeAlias = torch.Tensor
Made: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""(op, arguments, keyword arguments)."""
WIDTH, HEADS = 512, 4
"""Of matrices that are long enough, and of attention."""
_PAGE_NUMEL = 1024


class _Bank:
    """Random numbers in [-0.5, 0.5) that operands are cut from in turn: drawing them anew would take longest."""

    def __init__(self, numel: int) -> None:
        self._numbers = torch.rand(numel) - 0.5
        self._next = 0

    def cut(self, numel: int) -> Tensor:
        """The next so many numbers, on a page of their own."""
        if self._next + numel > self._numbers.numel():
            self._next = 0
        start, self._next = self._next, self._next + _PAGE_NUMEL * -(-numel // _PAGE_NUMEL)
        return self._numbers[start : start + numel]


@functools.cache
def _bank() -> _Bank:
    return _Bank(2 * COLD_BYTES // 4)


def drawn(*shape: int) -> Tensor:
    """On pages of their own."""
    return _bank().cut(math.prod(shape)).view(shape)


class Kernel:
    """An op of ours as programs run it, called as an op of torch is."""

    def __init__(self, op: Any, run: Callable[..., Any]) -> None:
        self._schema, self._name, self._run = op._schema, str(op), run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __str__(self) -> str:
        return self._name
