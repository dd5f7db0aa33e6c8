"""Pack: what crosses a cut as one flat tensor, so that a stage receives one activation and sends one.

A stage that carries values beside its activation unpacks them from what it receives and packs them into what it
sends: first the activation, then what is carried, in the order in which it was made, each as ``passes.message`` puts
it. The packed tensor lies on the axis as the activation does.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cost_model.precision import Precision
from cost_model.tensor import TensorMeta
from passes.graph import GraphInput, ModelGraph
from passes.message import places, put, take
from passes.pieces import segment_of
from passes.rewriter import GraphBuilder
from passes.shard import ShardedStage

aten = torch.ops.aten
PACKED = "packed_activation"


def pack(stage: ShardedStage, precision: Precision) -> ShardedStage:
    """The stage with at most one activation in and one value out; itself where that is so already. precision: what is
    packed has the dtype of the wire."""
    received = [i for i in stage.graph.inputs if i.kind == "activation"]
    if len(received) < 2 and len(stage.graph.outputs) < 2:
        return stage
    return _Pack(stage, received, precision).run()


class _Pack:
    def __init__(self, stage: ShardedStage, received: list[GraphInput], precision: Precision) -> None:
        self.stage, self.model, self.received, self.precision = stage, stage.graph, received, precision
        self.built = GraphBuilder()
        self.mapped: dict[fx.Node, Any] = {}
        numbers = [segment_of(n) for n in self.model.nodes() if segment_of(n) >= 0]
        self.first, self.last = min(numbers), max(numbers)

    def run(self) -> ShardedStage:
        by_name = {n.name: n for n in self.model.graph.nodes}
        packs = len(self.received) > 1
        kept = [i for i in self.model.inputs if not (packs and i.kind == "activation")]
        for item in kept:
            self.mapped[by_name[item.node]] = self.built.placeholder(item.node, self.model.metas[item.node])
        placements = {i.node: self.stage.placements[i.node] for i in kept}
        if packs:
            kept.append(GraphInput(PACKED, "activation", PACKED, False, False))
            placements[PACKED] = self.stage.placements[self.received[0].node]
            self._unpack(by_name)
        for node in self.model.nodes():
            self.mapped[node] = self.built.copy(node, self.mapped, self.model.metas[node.name])
        outputs = [self.mapped[by_name[name]] for name in self.model.outputs]
        out = self._packed(outputs) if len(outputs) > 1 else outputs[0]
        self.built.graph.output((out,))
        graph = ModelGraph(self.built.graph, self.built.metas, tuple(kept), (out.name,), self.model.batch)
        return replace(self.stage, graph=graph, placements=placements)

    def _unpack(self, by_name: dict[str, fx.Node]) -> None:
        call = functools.partial(self._call, self.first)
        metas = [self.model.tensor(i.node) for i in self.received]
        dtype = self.precision.sent(metas[0]).dtype
        sizes = [places(self.precision.sent(m), dtype) for m in metas]
        whole = self.built.placeholder(PACKED, TensorMeta((sum(sizes),), dtype))
        flat = tuple(TensorMeta((size,), dtype) for size in sizes)
        parts = call(aten.split_with_sizes.default, (whole, sizes), flat)
        for index, (item, meta) in enumerate(zip(self.received, metas, strict=True)):
            part = call(operator.getitem, (parts, index), flat[index])
            self.mapped[by_name[item.node]] = take(call, part, meta, dtype, self.precision)

    def _packed(self, outputs: list[fx.Node]) -> fx.Node:
        call = functools.partial(self._call, self.last)
        dtype = self.precision.sent(self.built.tensor(outputs[0])).dtype
        flat = [put(call, node, self.built.tensor(node), dtype, self.precision) for node in outputs]
        whole = TensorMeta((sum(self.built.tensor(n).numel for n in flat),), dtype)
        return call(aten.cat.default, (flat,), whole)

    def _call(self, segment: int, target: Any, args: tuple[Any, ...], meta: Any) -> fx.Node:
        made = self.built.call(target, args, meta)
        assert isinstance(made, fx.Node)
        made.meta["segment"] = segment
        return made
