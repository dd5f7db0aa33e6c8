"""Compress: what crosses a cut goes in a narrower dtype, cast before it is sent and after it is received.

The casts are calls of the stage's own graph. Traced jointly, they cast the gradients that go the other way as well, so
prices, memory and code know of nothing but casts and smaller messages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cost_model.precision import Precision
from cost_model.tensor import TensorMeta
from passes.graph import ModelGraph, torch_dtype
from passes.pieces import segment_of
from passes.rewriter import GraphBuilder
from passes.shard import ShardedStage

aten = torch.ops.aten


def compress(stage: ShardedStage, precision: Precision, *, last: bool) -> ShardedStage:
    """A packed stage with the dtype of the wire at its ends; itself where nothing is narrower. ``last``: its output is
    the loss, which is not sent."""
    model = stage.graph
    ends = [i.node for i in model.inputs if i.kind == "activation"] + ([] if last else list(model.outputs))
    if all(precision.sent(model.tensor(name)) == model.tensor(name) for name in ends):
        return stage
    return replace(stage, graph=_compressed(model, precision, frozenset(ends)))


def _compressed(model: ModelGraph, precision: Precision, ends: frozenset[str]) -> ModelGraph:
    """The graph again. A cast belongs to the segment that takes or makes the value."""
    built, mapped = GraphBuilder(), dict[fx.Node, Any]()
    numbers = [segment_of(node) for node in model.nodes() if segment_of(node) >= 0]
    for node in model.graph.nodes:
        if node.op == "placeholder":
            meta = model.tensor(node.name)
            narrow = precision.sent(meta) if node.name in ends else meta
            mapped[node] = _cast(built, built.placeholder(node.name, narrow), meta, min(numbers))
        elif node.op == "call_function":
            mapped[node] = built.copy(node, mapped, model.metas[node.name])
    by_name = {node.name: node for node in model.graph.nodes}
    (output,) = model.outputs
    meta = model.tensor(output)
    out = _cast(built, mapped[by_name[output]], precision.sent(meta) if output in ends else meta, max(numbers))
    built.graph.output((out,))
    return ModelGraph(built.graph, built.metas, model.inputs, (out.name,), model.batch)


def _cast(built: GraphBuilder, node: fx.Node, meta: TensorMeta, segment: int) -> fx.Node:
    """The value in the dtype of ``meta``, as part of a segment."""
    if built.tensor(node).dtype == meta.dtype:
        return node
    made: fx.Node = built.call(aten.to.dtype, (node, torch_dtype(meta.dtype)), meta)
    made.meta["segment"] = segment
    return made
