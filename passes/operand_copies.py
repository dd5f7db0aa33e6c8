"""Copies that CPU kernels of torch make of what they are given, while they run.

A kernel that walks several tensors at once first converts operands whose dtype it does not compute in
(aten/src/ATen/TensorIterator.cpp, ``compute_types``), and a reduction what it reduces
(aten/src/ATen/native/ReduceOpsUtils.h, ``make_reduction``). Others lay operands out element after element, or make a
result twice. Which do was found from the allocations of torch 2.13. Kernels of a GPU read what lies there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from passes.random_vocabulary import drop

_REDUCTIONS = {"sum", "prod", "cumsum", "cumprod", "any", "all"}
_READ_AS_THEY_ARE = {"where": "condition", "masked_fill": "mask"}
_LAID_OUT = {
    "native_layer_norm": ("input",),
    "native_layer_norm_backward": ("grad_out", "input"),
    "_softmax": ("self",),
    "_log_softmax": ("self",),
    "_softmax_backward_data": ("grad_output", "output"),
    "_log_softmax_backward_data": ("grad_output", "output"),
    "embedding_dense_backward": ("grad_output",),
    "nll_loss_forward": ("self",),
    "max_pool2d_with_indices": ("self",),
    "max_pool2d_with_indices_backward": ("grad_output",),
    "avg_pool2d": ("self",),
    "avg_pool2d_backward": ("grad_output",),
    "_adaptive_avg_pool2d": ("self",),
    "_adaptive_avg_pool2d_backward": ("grad_output",),
    "upsample_nearest2d_backward": ("grad_output",),
    "upsample_bilinear2d_backward": ("grad_output",),
}
_PRODUCTS = {"mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "mv": ("self",)}
_RESIZED = {"upsample_nearest2d", "upsample_bilinear2d"}


def copied_bytes(node: fx.Node) -> int:
    """Of all copies that one call makes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    given = _given(node, node.target)
    return _converted(node.target, given, node.meta.get("val")) + _laid_out(_name(node.target), given, node)


def _given(node: fx.Node, op: torch._ops.OpOverload) -> dict[str, Any]:
    """Tensors and numbers among the arguments, by name."""
    pairs = ((known.name, arg) for known, arg in zip(op._schema.arguments, node.args, strict=False))
    values = ((name, arg.meta.get("val") if isinstance(arg, fx.Node) else arg) for name, arg in pairs)
    return {name: value for name, value in values if isinstance(value, Tensor | int | float | complex)}


def _converted(op: torch._ops.OpOverload, given: dict[str, Any], result: Any) -> int:
    """Operands of another dtype than the op computes in, each in that dtype."""
    if not isinstance(result, Tensor):
        return 0
    apart = _READ_AS_THEY_ARE.get(_name(op))
    operands = [value for name, value in given.items() if name != apart]
    dtype = _computed_in(op, operands, result.dtype)
    tensors = [value for value in operands if isinstance(value, Tensor)]
    return sum(t.numel() * dtype.itemsize for t in tensors if t.dtype != dtype) if dtype is not None else 0


def _computed_in(op: torch._ops.OpOverload, operands: list[Any], result: torch.dtype) -> torch.dtype | None:
    """None: nothing is converted. What answers yes or no computes in the dtype that its operands have in common."""
    if _name(op) in _REDUCTIONS:
        return result
    if op is not drop and torch.Tag.pointwise not in op.tags:
        return None
    return result if result != torch.bool else functools.reduce(_common, operands[1:], operands[0].dtype)


def _common(one: torch.dtype, other: Any) -> torch.dtype:
    return torch.result_type(torch.empty(1, dtype=one), other)


def _laid_out(name: str, given: dict[str, Any], node: fx.Node) -> int:
    """Operands that are laid out anew, and results that are made twice."""
    tensors = [given[argument] for argument in _LAID_OUT.get(name, ()) if isinstance(given.get(argument), Tensor)]
    copied = [t for t in tensors if not t.is_contiguous()]
    copied += [given[argument] for argument in _PRODUCTS.get(name, ()) if not _is_matrix(given[argument])]
    if name == "native_batch_norm_backward" and given["grad_out"].is_contiguous() and given["input"].is_contiguous():
        copied.append(given["input"])  # its gradient is made once more where both lie so
    if name == "index_select" and not given["self"].is_contiguous() and given["dim"] % given["self"].dim():
        copied.append(given["self"])
    if name == "logsumexp":
        copied.append(given["self"])
    if name in _RESIZED:
        copied += [given["self"], node.meta["val"]]
    return sum(t.numel() * t.element_size() for t in copied)


def _is_matrix(x: Tensor) -> bool:
    """Whether a library for products takes it as it lies: rows or columns of neighbours, none within another."""
    last, leading = x.stride()[-2:], x.shape[-2:]
    plain = last[1] == 1 and (leading[0] == 1 or last[0] >= max(1, leading[1]))
    turned = last[0] == 1 and (leading[1] == 1 or last[1] >= max(1, leading[0]))
    return x.dim() < 2 or plain or turned


def _name(op: torch._ops.OpOverload) -> str:
    return op._schema.name.split("::")[-1]
