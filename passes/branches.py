"""Branches: ``torch.cond``, while a model is traced, is what both branches make, of which ``torch.where`` chooses.

The branch that is not taken is given 0.5 in place of what floats it takes, and 0 of what integers, so that neither its
values nor its slopes need to be finite where the user's are not; no gradient goes back through what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cost_model.errors import UnsupportedError

_FILL = 0.5


class Branches:
    """calls: how many were met."""

    def __init__(self) -> None:
        self.calls = 0

    @contextmanager
    def over(self) -> Iterator[None]:
        self.calls = 0
        with mock.patch.object(torch, "cond", self._chosen):
            yield

    def notes(self) -> tuple[str, ...]:
        """What programs compute that one device does not."""
        return (f"both branches of {self.calls} torch.cond are computed, of which one is chosen",) if self.calls else ()

    def _chosen(
        self,
        pred: Any,
        true_fn: Callable[..., Any],
        false_fn: Callable[..., Any],
        operands: tuple[Any, ...] | list[Any] = (),
    ) -> Any:
        if not isinstance(pred, Tensor):
            return (true_fn if pred else false_fn)(*operands)
        self.calls += 1
        is_taken = pred.reshape(())
        taken = true_fn(*pytree.tree_map(lambda leaf: _kept(is_taken, leaf), tuple(operands)))
        other = false_fn(*pytree.tree_map(lambda leaf: _kept(~is_taken, leaf), tuple(operands)))
        (found, spec), (others, form) = pytree.tree_flatten(taken), pytree.tree_flatten(other)
        if spec != form:
            raise UnsupportedError(f"the branches of a torch.cond return {spec} and {form}: return one form")
        return pytree.tree_unflatten([_either(is_taken, *pair) for pair in zip(found, others, strict=True)], spec)


def _kept(where: Tensor, leaf: Any) -> Any:
    """What a branch is given, something harmless where it is not taken."""
    if not isinstance(leaf, Tensor) or leaf.dtype == torch.bool:
        return leaf
    return torch.where(where, leaf, _FILL if leaf.is_floating_point() or leaf.is_complex() else 0)


def _either(is_taken: Tensor, first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            raise UnsupportedError(
                f"the branches of a torch.cond return {first.dtype}{list(first.shape)} and "
                f"{second.dtype}{list(second.shape)}: return equal shapes and dtypes"
            )
        return torch.where(is_taken, first, second)
    if type(first) is not type(second) or first != second:
        raise UnsupportedError(f"the branches of a torch.cond return {first!r} and {second!r}: return tensors")
    return first
