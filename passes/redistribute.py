"""Redistribute: the op of our vocabulary that turns one placement into another on one axis."""

from __future__ import annotations

from typing import Any

from torch import fx

from cost_model.errors import RuleError
from cost_model.placement import (
    PARTIAL,
    REPLICATE,
    Partial,
    Placement,
    Replicate,
    Shard,
    Varying,
    local_shape,
)
from cost_model.redistribution import conversion_steps
from cost_model.tensor import TensorMeta
from passes import vocabulary
from passes.rewriter import GraphBuilder


def redistribute(
    built: GraphBuilder, node: fx.Node, source: Placement, target: Placement, axis: str, size: int, *, like: fx.Node
) -> fx.Node:
    """Append the conversion of ``node`` from ``source`` to ``target``; the node itself where they are equal."""
    for step_source, step_target in conversion_steps(source, target):
        node = _step(built, node, step_source, step_target, axis, size, like)
    return node


def _step(
    built: GraphBuilder, node: fx.Node, source: Placement, target: Placement, axis: str, size: int, like: fx.Node
) -> fx.Node:
    meta = built.tensor(node)
    function, args = _call(source, target, axis, size)
    result = _resize(meta, source, target, size)
    made = built.call(function, (node, *args), result, like=like)
    assert isinstance(made, fx.Node)
    return made


def _call(source: Placement, target: Placement, axis: str, size: int) -> tuple[Any, tuple[Any, ...]]:
    match source, target:
        case Replicate(), Varying():
            return vocabulary.copy, (axis,)
        case Replicate(), Partial():
            return vocabulary.portion, (size,)
        case Varying(), Partial():
            return vocabulary.share, (size,)
        case Replicate(), Shard(dim, outer):
            return vocabulary.shard, (axis, size, dim, outer)
        case Partial(), Replicate():
            return vocabulary.reduce, (axis,)
        case Partial(), Shard(dim, outer):
            return vocabulary.scatter_sum, (axis, size, dim, outer)
        case Shard(dim, outer), Replicate():
            return vocabulary.gather, (axis, size, dim, outer, False)
        case Shard(dim, outer), Varying():
            return vocabulary.gather, (axis, size, dim, outer, True)
        case Shard(dim, 1), Shard(other, 1):
            return vocabulary.exchange, (axis, size, other, dim)
    raise RuleError("redistribute", f"no way from {source} to {target}; the planner must not choose it")


def _resize(meta: TensorMeta, source: Placement, target: Placement, size: int) -> TensorMeta:
    shape = list(meta.shape)
    if isinstance(source, Shard):
        shape[source.dim] *= size
    return TensorMeta(local_shape(tuple(shape), target, size), meta.dtype)


def ambient_shard(
    built: GraphBuilder, node: fx.Node, target: Placement, axis: str, size: int, *, like: fx.Node
) -> fx.Node:
    """An ambient value as an op wants it: sliced where it wants a shard, a portion of it in a sum."""
    if isinstance(target, Shard):
        meta = _resize(built.tensor(node), REPLICATE, target, size)
        made = built.call(vocabulary.take_shard, (node, axis, size, target.dim, target.outer), meta, like=like)
        assert isinstance(made, fx.Node)
        return made
    return redistribute(built, node, REPLICATE, PARTIAL, axis, size, like=like) if target == PARTIAL else node
