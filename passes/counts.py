"""Counts: ``torch.bincount`` with a ``minlength``, while a model is traced, as calls of a fixed shape.

Its result is longer where a value is larger, which programs cannot be: they raise there, as ``one_hot`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def counts_of_given_length() -> Iterator[None]:
    """Meanwhile a count without a ``minlength`` is torch's own, whose length no trace knows."""
    plain = torch.bincount

    def count(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
        return _counted(input, weights, minlength) if minlength else plain(input, weights)

    patched: tuple[tuple[Any, str], ...] = ((torch, "bincount"), (Tensor, "bincount"))
    with ExitStack() as stack:
        for owner, name in patched:
            stack.enter_context(mock.patch.object(owner, name, count))
        yield


def _counted(values: Tensor, weights: Tensor | None, length: int) -> Tensor:
    """Weights other than of single precision are added up in double precision, as torch does; none has a gradient."""
    found = functional.one_hot(values.long(), length)
    if weights is None:
        return found.sum(0)
    dtype = torch.float32 if weights.dtype == torch.float32 else torch.float64
    return (found.to(dtype) * weights.detach().to(dtype).unsqueeze(1)).sum(0)
