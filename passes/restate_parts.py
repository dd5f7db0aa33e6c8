"""Restate what is taken apart and put together again in order, as a value and its dims turned.

A value is often a list for a while (features of images, each of which might have been of another size), whose length
may be the batch's: calls that differ from one batch size to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes.calls import schema_arguments
from passes.graph import is_getitem
from passes.restate import REWRITES, rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_joined = REWRITES[aten.cat.default]
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True)
class _Part:
    """Of ``source`` along ``dim``, from ``start`` on; single: one place, without that dim."""

    source: fx.Node
    dim: int
    start: int
    extent: int
    single: bool


@rewrites(aten.cat.default)
def _put_together(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    whole = _whole(run, a["tensors"])
    if whole is None:
        return _joined(run, node, a)
    dim = a["dim"] % len(run.tensor(a["tensors"][0]).shape)
    if not whole.single:
        return whole.source if dim == whole.dim else _joined(run, node, a)
    turned = _turned(run, node, whole, dim)
    meta = run.tensor(turned)
    shape = (*meta.shape[:dim], meta.shape[dim] * meta.shape[dim + 1], *meta.shape[dim + 2 :])
    return run.call(aten.reshape.default, (turned, list(shape)), TensorMeta(shape, meta.dtype), like=node)


@rewrites(aten.stack.default)
def _laid_together(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    whole = _whole(run, a["tensors"])
    if whole is None or not whole.single:
        return NotImplemented
    return _turned(run, node, whole, a["dim"] % len(run.tensor(whole.source).shape))


def _turned(run: Cleaner, node: fx.Node, part: _Part, to: int) -> fx.Node:
    """The source with the dim of its parts at another place."""
    meta = run.tensor(part.source)
    order = [dim for dim in range(len(meta.shape)) if dim != part.dim]
    order.insert(to, part.dim)
    if order == sorted(order):
        return part.source
    shape = tuple(meta.shape[dim] for dim in order)
    made = run.call(aten.permute.default, (part.source, order), TensorMeta(shape, meta.dtype), like=node)
    assert isinstance(made, fx.Node)
    return made


def _whole(run: Cleaner, tensors: Sequence[fx.Node]) -> _Part | None:
    """The first of parts that are, in order, all that there is of one value; None where they are not."""
    parts = [_part(run, tensor) for tensor in tensors]
    first, end = parts[0], 0
    for part in parts:
        if first is None or part is None or part.start != end:
            return None
        if (part.source, part.dim, part.single) != (first.source, first.dim, first.single):
            return None
        end += part.extent
    return first if first is not None and end == run.tensor(first.source).shape[first.dim] else None


def _part(run: Cleaner, node: fx.Node) -> _Part | None:
    call, number = node, 0
    if is_getitem(node):
        call, number = node.args  # type: ignore[assignment]
    if not isinstance(call.target, torch._ops.OpOverload):
        return None
    given = schema_arguments(call)
    source: Any = given.get("self", given.get("tensor"))
    single = call.target is aten.select.int if call is node else call.target is aten.unbind.int
    if not single and (call is node or call.target not in _SPLITS):
        return None
    dim = given["dim"] % len(run.tensor(source).shape)
    if single:
        place = given["index"] % run.tensor(source).shape[dim] if call is node else number
        return _Part(source, dim, place, 1, True)
    metas = run.built.metas[call.name]
    assert isinstance(metas, tuple)
    extents = [meta.shape[dim] for meta in metas if meta is not None]
    return _Part(source, dim, sum(extents[:number]), extents[number], False)
