"""Specialise: the traced graph at any batch size, by comparing it at two.

Sizes inside a graph (shapes, ``arange`` ends, slice bounds) are affine in the batch; what differs between two
traces is interpolated. Scalars that enter arithmetic keep the global batch's value: a loss divided by the
batch size is divided by the global one whatever a microbatch holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes.graph import Meta, ModelGraph
from passes.rewriter import GraphBuilder
from passes.trace import Traced

_SIZE_SCALARS = {"arange", "linspace", "range"}


class BatchMismatchError(ValueError):
    """The two traces are not one graph at two sizes: control flow or a shape depends on the batch in another way."""


def specialise(traced: Traced, batch: int) -> ModelGraph:
    """The forward graph for ``batch`` samples; the traced graph itself for the global batch."""
    whole, other = traced.global_graph, traced.other
    if batch == whole.batch:
        return whole
    if other is None:
        raise UnsupportedError(f"the batch of {whole.batch} cannot be split into parts of {batch}: {'; '.join(traced.notes)}")
    return _Affine(whole, other, batch).run()


class _Affine:
    def __init__(self, whole: ModelGraph, other: ModelGraph, batch: int) -> None:
        self.whole, self.other, self.batch = whole, other, batch

    def run(self) -> ModelGraph:
        nodes, others = list(self.whole.graph.nodes), list(self.other.graph.nodes)
        if [str(n.target) for n in nodes if n.op == "call_function"] != [
            str(n.target) for n in others if n.op == "call_function"
        ]:
            raise BatchMismatchError("the model runs different ops at different batch sizes")
        built, mapped = GraphBuilder(), {}
        for node, twin in zip(nodes, others, strict=True):
            if node.op == "placeholder":
                mapped[node] = built.placeholder(node.name, self._meta(node, twin))
            elif node.op == "call_function":
                mapped[node] = self._copy(built, mapped, node, twin)
        built.graph.output(tuple(mapped[n] for n in nodes if n.name in self.whole.outputs))
        return ModelGraph(built.graph, built.metas, self.whole.inputs, self.whole.outputs, self.batch)

    def _copy(self, built: GraphBuilder, mapped: dict[fx.Node, Any], node: fx.Node, twin: fx.Node) -> fx.Node:
        made = built.copy(node, mapped, self._meta(node, twin))
        assert made.name == node.name
        if isinstance(node.target, torch._ops.OpOverload):
            size_scalars = node.target._schema.name.split("::")[1] in _SIZE_SCALARS
            made.args = tuple(
                self._blend(a, b, _is_size(node, i) or size_scalars)
                for i, (a, b) in enumerate(zip(made.args, twin.args, strict=True))
            )
        return made

    def _meta(self, node: fx.Node, twin: fx.Node) -> Meta:
        a, b = self.whole.metas[node.name], self.other.metas[twin.name]
        if isinstance(a, TensorMeta):
            assert isinstance(b, TensorMeta)
            return self._blend_meta(a, b)
        assert not isinstance(b, TensorMeta)
        return tuple(None if x is None or y is None else self._blend_meta(x, y) for x, y in zip(a, b, strict=True))

    def _blend_meta(self, a: TensorMeta, b: TensorMeta) -> TensorMeta:
        if len(a.shape) != len(b.shape):
            raise BatchMismatchError("a tensor's rank depends on the batch")
        return TensorMeta(tuple(self._blend(x, y, True) for x, y in zip(a.shape, b.shape, strict=True)), a.dtype)

    def _blend(self, a: Any, b: Any, is_size: bool) -> Any:
        """``a`` belongs to the new graph already; lists of sizes blend elementwise, nodes and others stay."""
        if isinstance(a, list | tuple):
            return type(a)(self._blend(x, y, is_size) for x, y in zip(a, b, strict=True))
        if not is_size or type(a) is not int or type(b) is not int or a == b:
            return a
        numerator = (a - b) * (self.batch - self.whole.batch)
        value, rest = divmod(numerator, self.whole.batch - self.other.batch)
        if rest:
            raise BatchMismatchError(f"a size of {a} at batch {self.whole.batch} is no whole number at {self.batch}")
        return a + value


def _is_size(node: fx.Node, position: int) -> bool:
    """Whether an argument is declared as an int (SymInt in the schema), not as an arithmetic Scalar."""
    assert isinstance(node.target, torch._ops.OpOverload)
    kind = str(node.target._schema.arguments[position].type)
    return "int" in kind.lower()
