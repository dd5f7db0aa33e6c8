"""Counts: calls whose results are as long as values say, while a model is traced, as calls of a fixed shape.

The result of ``torch.bincount`` is longer where a value is larger than its ``minlength``, which programs cannot be:
they raise there, as ``one_hot`` does. ``repeat_interleave`` is as long as counts of numbers alone add up to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from passes.settled import settled


@contextmanager
def counts_of_given_length() -> Iterator[None]:
    """Meanwhile a count without a ``minlength`` is torch's own, whose length no trace knows, and so are repetitions by
    counts that have no values."""
    plain, repeating = torch.bincount, torch.repeat_interleave

    def count(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
        return _counted(input, weights, minlength) if minlength else plain(input, weights)

    def repeat(input: Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None) -> Tensor:
        if output_size is None:
            output_size = _repeated_size(input, repeats, dim)
        if repeats is None:
            return repeating(input, output_size=output_size)
        return repeating(input, repeats, dim, output_size=output_size)

    with ExitStack() as stack:
        for name, made in (("bincount", count), ("repeat_interleave", repeat)):
            for owner in (torch, Tensor):
                stack.enter_context(mock.patch.object(owner, name, made))
        yield


def _repeated_size(values: Tensor, repeats: Any, dim: int | None) -> int | None:
    """How long a dim is that is repeated by counts of numbers alone; None where they are not."""
    counts = settled(values if repeats is None else repeats) if isinstance(repeats, Tensor | None) else None
    if counts is None:
        return None
    is_spread = repeats is not None and counts.numel() == 1
    with torch._C.DisableTorchFunction():
        extent = values.numel() if dim is None else values.shape[dim]
        return int(counts.sum()) * (extent if is_spread else 1)


def _counted(values: Tensor, weights: Tensor | None, length: int) -> Tensor:
    """Weights other than of single precision are added up in double precision, as torch does; none has a gradient."""
    found = functional.one_hot(values.long(), length)
    if weights is None:
        return found.sum(0)
    dtype = torch.float32 if weights.dtype == torch.float32 else torch.float64
    return (found.to(dtype) * weights.detach().to(dtype).unsqueeze(1)).sum(0)
