"""Message: how the values that cross a cut lie in one flat tensor, which has the dtype of the activation as it is sent.

A value of a narrower dtype is cast, which is exact both ways; of any other it is the bits that cross, gradients' too.
Only what ``Precision.wire`` makes narrower is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cost_model.precision import Precision
from cost_model.tensor import DTYPE_BYTES, TensorMeta
from passes.graph import torch_dtype
from passes.vocabulary import bits

aten = torch.ops.aten
Call = Callable[[Any, tuple[Any, ...], TensorMeta], fx.Node]
"""Puts a call of a target into a graph: operands, and the meta of what it makes."""


def places(meta: TensorMeta, dtype: str) -> int:
    """How many numbers of the message's dtype hold a value."""
    return meta.numel * max(DTYPE_BYTES[meta.dtype] // DTYPE_BYTES[dtype], 1)


def carried_bytes(meta: TensorMeta, dtype: str) -> int:
    """Of a value in a message of that dtype."""
    return places(meta, dtype) * DTYPE_BYTES[dtype]


def put(call: Call, node: fx.Node, meta: TensorMeta, dtype: str, precision: Precision) -> fx.Node:
    """A value as its part of the message."""
    flat = TensorMeta((math.prod(meta.shape),), meta.dtype)
    made = call(aten.reshape.default, (node, list(flat.shape)), flat)
    sent = precision.sent(flat)
    made = _cast(call, made, flat, sent.dtype)
    return _cast(call, made, sent, dtype) if _fits(sent, dtype) else _bits(call, made, sent, dtype)


def take(call: Call, part: fx.Node, meta: TensorMeta, dtype: str, precision: Precision) -> fx.Node:
    """The value from its part of the message."""
    sent = precision.sent(meta)
    found = TensorMeta((places(sent, dtype),), dtype)
    made = (_cast if _fits(sent, dtype) else _bits)(call, part, found, sent.dtype)
    made = _cast(call, made, TensorMeta((meta.numel,), sent.dtype), meta.dtype)
    return call(aten.reshape.default, (made, list(meta.shape)), meta)


def _fits(meta: TensorMeta, dtype: str) -> bool:
    """Whether numbers of the message's dtype have all of the value's."""
    return meta.dtype == dtype or DTYPE_BYTES[meta.dtype] < DTYPE_BYTES[dtype]


def _cast(call: Call, node: fx.Node, meta: TensorMeta, dtype: str) -> fx.Node:
    return node if meta.dtype == dtype else call(aten.to.dtype, (node, torch_dtype(dtype)), replace(meta, dtype=dtype))


def _bits(call: Call, node: fx.Node, meta: TensorMeta, dtype: str) -> fx.Node:
    numel = meta.nbytes // DTYPE_BYTES[dtype]
    return call(bits, (node, torch_dtype(dtype)), TensorMeta((numel,), dtype))
