"""Restate ``masked_scatter``: values go to the places where a mask is true, in their order.

The place of a value follows from how many places are true before, so that it is a lookup and a choice. Where the mask
is one for whole rows (features of an image for the tokens that stand for it) rows are looked up, whose dim is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes.restate import rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten


@rewrites(aten.masked_scatter.default)
def _placed(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    meta, source = run.tensor(a["self"]), run.tensor(a["source"])
    mask, width = _rows(run, a["mask"], meta, source), meta.shape[-1] if meta.shape else 1
    if mask is None:
        width, wide = 1, TensorMeta(meta.shape, "bool")
        mask = run.call(aten.expand.default, (a["mask"], list(meta.shape)), wide, like=node)
    count, rows = meta.numel // width, source.numel // width
    made, index = a["source"], _places(run, node, mask, count)
    for target, args, shape in (
        (aten.reshape.default, ([rows, width],), (rows, width)),
        (aten.index_select.default, (0, index), (count, width)),
        (aten.reshape.default, (list(meta.shape),), meta.shape),
    ):
        made = run.call(target, (made, *args), TensorMeta(shape, source.dtype), like=node)
    return run.call(aten.where.self, (mask, made, a["self"]), meta, like=node)


def _rows(run: Cleaner, mask: fx.Node, meta: TensorMeta, source: TensorMeta) -> fx.Node | None:
    """[..., 1], the mask before it was spread over the last dim; None where it was not, or no rows are given."""
    before = mask.args[0] if mask.target is aten.expand.default else mask
    assert isinstance(before, fx.Node)
    is_spread = bool(meta.shape) and run.tensor(before).shape == (*meta.shape[:-1], 1)
    return before if is_spread and meta.shape[-1] and source.numel % meta.shape[-1] == 0 else None


def _places(run: Cleaner, node: fx.Node, mask: fx.Node, count: int) -> fx.Node:
    """[count]: how many places before each are true."""
    flat, numbers = TensorMeta((count,), "bool"), TensorMeta((count,), "int64")
    made = run.call(aten.reshape.default, (mask, [count]), flat, like=node)
    made = run.cast(node, made, "int64")
    for target, number in ((aten.cumsum.default, 0), (aten.sub.Scalar, 1), (aten.clamp.default, 0)):
        made = run.call(target, (made, number), numbers, like=node)
    assert isinstance(made, fx.Node)
    return made
