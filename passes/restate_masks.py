"""Restate calls with boolean masks, which pick as many elements as are true: a shape that no program can be made for.

What is laid over the places of a mask is a choice at every place; what is picked by one is refused, and the user told
what to write instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes.flat import flat
from passes.graph import source_of
from passes.restate import REWRITES, rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_MASKS = ("bool", "uint8")
_positions = REWRITES[aten.index.Tensor]


def refuse_unknown_shape(node: fx.Node) -> None:
    """UnsupportedError where a shape follows from the values of a tensor."""
    if is_unknown(node.meta.get("val")):
        raise refused(node)


def is_unknown(value: Any) -> bool:
    """Whether a shape follows from the values of a tensor."""
    made = (leaf for leaf in flat(value)[0] if isinstance(leaf, torch.Tensor))
    return any(isinstance(extent, torch.SymInt) for tensor in made for extent in tensor.shape)


def refused(node: fx.Node) -> UnsupportedError:
    if node.target is aten.bincount.default:
        return UnsupportedError(
            f"{node.target} counts up to the largest value there is ({source_of(node)}), and programs are of fixed "
            "shapes: with n values, write torch.nn.functional.one_hot(x, n).sum(0) for torch.bincount(x, minlength=n)"
        )
    return UnsupportedError(
        f"{node.target} gives as many elements as a mask is true or as values differ ({source_of(node)}), and programs "
        "are of fixed shapes: keep every element and weigh it (torch.where(mask, x, 0.0).sum() / mask.sum() for "
        "x[mask].mean(), masked_fill before a softmax, ignore_index in a loss); where the mask is always the same, "
        "make its positions in __init__ (register_buffer('at', mask.nonzero().squeeze(1))) and index with these"
    )


@rewrites(aten.index.Tensor)
def _index(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    if any(i is not None and run.tensor(i).dtype in _MASKS for i in a["indices"]):
        raise refused(node)
    return _positions(run, node, a)


@rewrites(aten.index_put.default)
def _laid_over(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """``x[mask] = value``: a choice between both where the value is one for all places; else values in their order."""
    (mask, *more), meta, value = a["indices"], run.tensor(a["self"]), run.tensor(a["values"])
    if mask is None or more or run.tensor(mask).dtype != "bool" or a["accumulate"]:
        return NotImplemented
    places, rest = run.tensor(mask).shape, meta.shape[len(run.tensor(mask).shape) :]
    if rest:
        shape = (*places, *[1] * len(rest))
        mask = run.call(aten.reshape.default, (mask, list(shape)), TensorMeta(shape, "bool"), like=node)
    if len(value.shape) <= len(rest):
        return run.call(aten.where.self, (mask, a["values"], a["self"]), meta, like=node)
    if value.shape[0] == 1:
        one = run.call(aten.squeeze.dim, (a["values"], 0), TensorMeta(value.shape[1:], value.dtype), like=node)
        return run.call(aten.where.self, (mask, one, a["self"]), meta, like=node)
    wide = TensorMeta((value.shape[0], *rest), value.dtype)
    source = a["values"]
    if wide != value:
        source = run.call(aten.expand.default, (source, list(wide.shape)), wide, like=node)
    if rest:
        mask = run.call(aten.expand.default, (mask, list(meta.shape)), TensorMeta(meta.shape, "bool"), like=node)
    return REWRITES[aten.masked_scatter.default](run, node, {"self": a["self"], "mask": mask, "source": source})
