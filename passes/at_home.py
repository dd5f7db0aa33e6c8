"""At home: parameters are read where training holds them; what reads one elsewhere reads a copy that comes along.

A model's outputs may need a parameter in another part of the chain than its loss does (a model that returns weights, or
norms of them). The part that holds it copies it, and the copy crosses cuts as any other value does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from passes.graph import ModelGraph
from passes.rewriter import GraphBuilder

aten = torch.ops.aten


def read_at_home(model: ModelGraph, homes: Mapping[str, Sequence[int]]) -> ModelGraph:
    """The graph with such copies; itself where none are needed. homes: of parameters, by node, the parts of the chain
    that hold them, in order; one without is read anywhere."""
    parts = _parts(model, homes)
    abroad = {
        name
        for node, part in parts.items()
        for name in _read(node, homes)
        if part not in homes[name] and homes[name][0] < part
    }
    return _copied(model, homes, parts, abroad) if abroad else model


def _read(node: fx.Node, homes: Mapping[str, Sequence[int]]) -> list[str]:
    return [o.name for o in node.all_input_nodes if o.name in homes]


def _parts(model: ModelGraph, homes: Mapping[str, Sequence[int]]) -> dict[fx.Node, int]:
    """Of each call the part of the chain that it is in: the last one whose parameters were read so far."""
    found, part = {}, 0
    for node in model.nodes():
        for name in _read(node, homes):
            part = max(part, next((home for home in homes[name] if home >= part), part))
        found[node] = part
    return found


def _copied(
    model: ModelGraph, homes: Mapping[str, Sequence[int]], parts: Mapping[fx.Node, int], abroad: set[str]
) -> ModelGraph:
    """Each copy stands before the first call of its part that reads a parameter."""
    built, mapped, copies = GraphBuilder(), dict[fx.Node, Any](), dict[str, fx.Node]()
    for node in model.graph.nodes:
        if node.op == "placeholder":
            mapped[node] = built.placeholder(node.name, model.metas[node.name])
        elif node.op == "call_function":
            if _read(node, homes):
                for name in sorted(n for n in abroad - copies.keys() if homes[n][0] <= parts[node]):
                    copies[name] = built.call(aten.clone.default, (_named(mapped, name),), model.metas[name])
            away = {o: copies[o.name] for o in node.all_input_nodes if o.name in copies}
            given = {o: copy for o, copy in away.items() if parts[node] not in homes[o.name]}
            mapped[node] = built.copy(node, {**mapped, **given}, model.metas[node.name])
    outputs = tuple(_named(mapped, name) for name in model.outputs)
    built.graph.output(outputs)
    return ModelGraph(built.graph, built.metas, model.inputs, tuple(n.name for n in outputs), model.batch)


def _named(mapped: Mapping[fx.Node, Any], name: str) -> fx.Node:
    found: fx.Node = next(made for node, made in mapped.items() if node.name == name)
    return found
