"""How a backward's gradients get into their buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _later(group: str) -> None:
    """Gradients are reduced after the last backward."""


class Store:
    """The first and only gradients of a step: what the buffers held is not read.

    complete: called with the name of each group whose gradients are all there.
    """

    def __init__(self, complete: Callable[[str], None] = _later) -> None:
        self.complete = complete

    def __call__(self, buffer: Tensor, gradient: Tensor) -> None:
        buffer.copy_(gradient)

    def product(self, buffer: Tensor, left: Tensor, right: Tensor) -> None:
        torch.mm(left, right, out=buffer)


class Add(Store):
    """Gradients of one of several microbatches, or batches."""

    def __call__(self, buffer: Tensor, gradient: Tensor) -> None:
        buffer.add_(gradient)

    def product(self, buffer: Tensor, left: Tensor, right: Tensor) -> None:
        torch.addmm(buffer, left, right, out=buffer)
