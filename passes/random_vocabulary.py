"""Random ops of ours: values are a function of a key and of the coordinates, which ranks and parts hold their part of.

Until ``draws`` has given them out, an op's key is None and its coordinates are empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from passes.layer_vocabulary import DIFFERENTIABLE
from passes.vocabulary import define

RANDOM_STATE = "autopar.random_state"
"""Batch input [2], int64: the seed, and the number of the step."""
SAMPLES = "autopar.samples"
"""Batch input [batch], int64: the number of each sample in the global batch."""


@define("random_keys(Tensor state, int count) -> Tensor")
def random_keys(state: Tensor, count: int) -> Tensor:
    return state.new_empty([count])


@define("dropout(Tensor x, Tensor? key, Tensor[] coordinates, float p) -> (Tensor, Tensor)")
def _dropout(x: Tensor, key: Tensor, coordinates: list[Tensor], p: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _drawn(key, coordinates, torch.bool)


@define("keep(Tensor key, Tensor[] coordinates, float p) -> Tensor")
def keep(key: Tensor, coordinates: list[Tensor], p: float) -> Tensor:
    return _drawn(key, coordinates, torch.bool)


@define("drop(Tensor x, Tensor mask, float scale) -> Tensor")
def drop(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask


@define("uniform(Tensor? key, Tensor[] coordinates) -> Tensor")
def uniform(key: Tensor, coordinates: list[Tensor]) -> Tensor:
    return _drawn(key, coordinates, torch.float32)


@define("normal(Tensor? key, Tensor[] coordinates) -> Tensor")
def normal(key: Tensor, coordinates: list[Tensor]) -> Tensor:
    return _drawn(key, coordinates, torch.float32)


@define("random_integers(Tensor? key, Tensor[] coordinates) -> Tensor")
def random_integers(key: Tensor, coordinates: list[Tensor]) -> Tensor:
    return _drawn(key, coordinates, torch.int64)


def _drawn(key: Tensor, coordinates: list[Tensor], dtype: torch.dtype) -> Tensor:
    return key.new_empty([c.shape[0] for c in coordinates], dtype=dtype)


class _Dropout(Function):
    """The mask is drawn forward and kept, or drawn again where the plan says that it is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, p: float, *coordinates: Tensor) -> Any:
        mask = keep(key, list(coordinates), p)
        ctx.save_for_backward(mask)
        ctx.mark_non_differentiable(mask)
        ctx.scale = 1 / (1 - p)
        return drop(x, mask, ctx.scale), mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return drop(grads[0], mask, ctx.scale), *[None] * (len(ctx.needs_input_grad) - 1)


def dropout(x: Tensor, key: Tensor, coordinates: list[Tensor], p: float) -> tuple[Tensor, Tensor]:
    """(x with each element zero with probability p < 1, else x / (1 - p); the mask of those that are not)."""
    return _Dropout.apply(x, key, p, *coordinates)  # type: ignore[no-any-return,no-untyped-call]


DROPOUT = torch.ops.autopar.dropout.default
DRAWING = {DROPOUT: 1, uniform: 0, normal: 0, random_integers: 0}
"""Ops that draw -> the place of their key; the coordinates follow."""
DIFFERENTIABLE[DROPOUT] = dropout
