"""How a backward's gradients get into their buffers."""

from __future__ import annotations

import torch
from torch import Tensor


class Store:
    """The first and only gradients of a step: what the buffers held is not read."""

    def __call__(self, buffer: Tensor, gradient: Tensor) -> None:
        buffer.copy_(gradient)

    def product(self, buffer: Tensor, left: Tensor, right: Tensor) -> None:
        torch.mm(left, right, out=buffer)


class Add:
    """Gradients of one of several microbatches, or batches."""

    def __call__(self, buffer: Tensor, gradient: Tensor) -> None:
        buffer.add_(gradient)

    def product(self, buffer: Tensor, left: Tensor, right: Tensor) -> None:
        torch.addmm(buffer, left, right, out=buffer)
