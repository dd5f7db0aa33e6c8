"""Draws: every random call gets a key of its own and the coordinates of its elements.

A coordinate is the index along one dim of the whole tensor. Coordinates are ambient values: a rank that holds a part of
a dim takes the part of its coordinates, however the dim is split. Where a dim is made of samples (and of elements of
each: "(b i)"), they follow from the numbers of the samples in the global batch, an input like the user's own; so masks
do not depend on how the batch is split. The key follows from the seed, the step (another input) and the call's place in
the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes.graph import GraphInput, ModelGraph
from passes.random_vocabulary import DRAWING, RANDOM_STATE, SAMPLES, random_keys
from passes.rewriter import GraphBuilder
from passes.specialise import BatchMismatchError, twins

aten = torch.ops.aten


def give_draws(graph: ModelGraph, other: ModelGraph | None) -> tuple[ModelGraph, ModelGraph | None]:
    """The graph at both batch sizes with keys and coordinates; unchanged where nothing is random."""
    if not any(n.target in DRAWING for n in graph.nodes()):
        return graph, other
    try:
        same = {} if other is None else {a.name: b.name for a, b in twins(graph, other).items()}
    except BatchMismatchError:  # the analysis of the batch will say so: the batch is not split
        same = {}
    inner = {name: _samples_in(graph, other, name, same[name]) for name in _drawing(graph) if name in same}
    of_other = {same[name]: dims for name, dims in inner.items()}
    return _Draws(graph, inner).run(), None if other is None else _Draws(other, of_other).run()


def _drawing(graph: ModelGraph) -> list[str]:
    return [n.name for n in graph.nodes() if n.target in DRAWING]


def _samples_in(graph: ModelGraph, other: ModelGraph | None, name: str, twin: str) -> dict[int, int]:
    """Dim -> elements of each sample along it, of the dims that are in proportion to the batch."""
    assert other is not None
    pairs = enumerate(zip(_shape(graph, name), _shape(other, twin), strict=True))
    split = {d: a // graph.batch for d, (a, b) in pairs if a != b and a * other.batch == b * graph.batch}
    return {d: inner for d, inner in split.items() if inner}


def _shape(graph: ModelGraph, name: str) -> tuple[int, ...]:
    """Of what a call draws: its first result."""
    meta = graph.metas[name]
    first = meta if isinstance(meta, TensorMeta) else meta[0]
    assert first is not None
    return first.shape


class _Draws:
    """inner: random call -> dim -> elements of each sample."""

    def __init__(self, graph: ModelGraph, inner: Mapping[str, Mapping[int, int]]) -> None:
        self.graph, self.inner = graph, inner
        self.built = GraphBuilder()
        self.mapped: dict[fx.Node, Any] = {}
        self.count = len(_drawing(graph))

    def run(self) -> ModelGraph:
        given = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        for node in given:
            self.mapped[node] = self.built.placeholder(node.name, self.graph.metas[node.name])
        state = self.built.placeholder("random_state", TensorMeta((2,), "int64"))
        self.samples = self.built.placeholder("samples", TensorMeta((self.graph.batch,), "int64"))
        own = (
            GraphInput(state.name, "batch", RANDOM_STATE, False, False),
            GraphInput(self.samples.name, "batch", SAMPLES, False, True),
        )
        keys = self.built.call(random_keys, (state, self.count), TensorMeta((self.count,), "int64"))
        number = 0
        for node in self.graph.nodes():
            if node.target in DRAWING:
                key = self.built.call(aten.select.int, (keys, 0, number), TensorMeta((), "int64"), like=node)
                self.mapped[node] = self._drawn(node, key)
                number += 1
            else:
                self.mapped[node] = self.built.copy(node, self.mapped, self.graph.metas[node.name])
        return self._finished(own)

    def _finished(self, own: tuple[GraphInput, ...]) -> ModelGraph:
        by_name = {n.name: n for n in self.graph.graph.nodes}
        outputs = tuple(self.mapped[by_name[name]] for name in self.graph.outputs)
        self.built.graph.output(outputs)
        if not self.samples.users:
            self.built.graph.erase_node(self.samples)
            own = own[:1]
        return replace(
            self.graph,
            graph=self.built.graph,
            metas=self.built.metas,
            inputs=(*self.graph.inputs, *own),
            outputs=tuple(n.name for n in outputs),
        )

    def _drawn(self, node: fx.Node, key: fx.Node) -> fx.Node:
        at, inner = DRAWING[node.target], self.inner.get(node.name, {})
        shape = _shape(self.graph, node.name)
        coordinates = [self._coordinate(node, extent, inner.get(dim)) for dim, extent in enumerate(shape)]
        args = list(fx.map_arg(node.args, lambda n: self.mapped[n]))
        args[at : at + 2] = [key, coordinates]
        made = self.built.call(node.target, tuple(args), self.graph.metas[node.name], like=node)
        assert isinstance(made, fx.Node)
        return made

    def _coordinate(self, node: fx.Node, extent: int, inner: int | None) -> fx.Node:
        """Indices along one dim; inner: elements that each sample has of it, None where it does not know samples."""
        if inner is None:
            return self._counted(node, extent)
        if inner == 1:
            return self.samples
        batch = extent // inner
        made = self._call(node, aten.mul.Tensor, (self.samples, inner), (batch,))
        made = self._call(node, aten.unsqueeze.default, (made, 1), (batch, 1))
        made = self._call(node, aten.add.Tensor, (made, self._counted(node, inner)), (batch, inner))
        return self._call(node, aten.reshape.default, (made, [extent]), (extent,))

    def _counted(self, node: fx.Node, extent: int) -> fx.Node:
        made = self._call(node, aten.arange.default, (extent,), (extent,))
        made.kwargs = {"device": torch.device("cpu")}
        return made

    def _call(self, node: fx.Node, target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
        made = self.built.call(target, args, TensorMeta(shape, "int64"), like=node)
        assert isinstance(made, fx.Node)
        return made
