"""Redistribute: the ops of our vocabulary that turn one placement into another, move by move."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from cost_model.axes import Axes
from cost_model.errors import RuleError
from cost_model.placement import (
    REPLICATE,
    Partial,
    Placement,
    Placements,
    Replicate,
    Shard,
    Varying,
    as_held,
    mesh_shape,
)
from cost_model.routes import RouteBook
from cost_model.tensor import TensorMeta
from passes import vocabulary
from passes.rewriter import GraphBuilder


@functools.lru_cache(maxsize=8)
def routes_on(mesh: Axes) -> RouteBook:
    """Kept from stage to stage."""
    return RouteBook(mesh)


def redistribute(
    built: GraphBuilder, node: fx.Node, meta: TensorMeta, ends: tuple[Placements, Placements], mesh: Axes, like: fx.Node
) -> fx.Node:
    """Append the conversion of ``node``, whole ``meta``, from one placement to another; itself where they are equal."""
    for move in routes_on(mesh).route(meta, *ends):
        function, args = _call(move.source, move.target, mesh.name(move.axes), mesh.ranks(move.axes))
        node = _made(built, function, (node, *args), meta, move.after, mesh, like)
    return node


def _made(
    built: GraphBuilder,
    function: Any,
    args: tuple[Any, ...],
    meta: TensorMeta,
    places: Placements,
    mesh: Axes,
    like: fx.Node,
) -> fx.Node:
    local = TensorMeta(mesh_shape(meta.shape, places, mesh.sizes), meta.dtype)
    made = built.call(function, args, local, like=like)
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


def ambient_shard(
    built: GraphBuilder, node: fx.Node, meta: TensorMeta, target: Placements, mesh: Axes, like: fx.Node
) -> fx.Node:
    """An ambient value, whole ``meta``, as an op wants it: sliced where it wants a shard, a portion of it in a sum."""
    places: Placements = (REPLICATE,) * len(target)
    for axis in sorted(range(len(target)), key=lambda axis: getattr(target[axis], "outer", 0)):
        wanted = target[axis]
        places = (*places[:axis], wanted, *places[axis + 1 :])
        if isinstance(wanted, Shard):
            own = as_held(places, axis, mesh.sizes)
            assert isinstance(own, Shard)
            args = (node, mesh.name((axis,)), mesh.sizes[axis], own.dim, own.outer)
            node = _made(built, vocabulary.take_shard, args, meta, places, mesh, like)
        elif isinstance(wanted, Partial):
            node = _made(built, vocabulary.portion, (node, mesh.sizes[axis]), meta, places, mesh, like)
    return node
