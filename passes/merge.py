"""Merge: ambient values computed more than once (each layer's own mask) are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from passes.dependence import active_nodes
from passes.graph import ModelGraph, drop_dead_calls, op_name


def merge_equal(graphs: Sequence[ModelGraph]) -> None:
    """In place, in one model's graphs at several batch sizes: calls that depend on no parameter and are equal in all
    of them are made one. Calls that are equal at one size only (``arange`` of the batch and of a sequence as long)
    are not; graphs that differ in structure stay as they are."""
    calls = [graph.nodes() for graph in graphs]
    if len({tuple(map(op_name, nodes)) for nodes in calls}) != 1:
        return
    active = active_nodes(graphs[0])
    first_of: dict[Any, tuple[fx.Node, ...]] = {}
    for same in zip(*calls, strict=True):
        if same[0].name in active or not _is_pure(same[0]):
            continue
        first = first_of.setdefault(tuple(map(_key, same)), same)
        if first is not same:
            for node, kept in zip(same, first, strict=True):
                node.replace_all_uses_with(kept)
    for graph in graphs:
        drop_dead_calls(graph.graph)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _key(node: fx.Node) -> tuple[Any, ...]:
    """Equal for calls of one op on the very same operands: a node prints as its name, a number with its type."""
    return (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
