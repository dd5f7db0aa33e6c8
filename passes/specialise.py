"""Specialise: the traced graph at any batch size, by comparing it at two.

Sizes inside a graph (shapes, ``arange`` ends, slice bounds) are affine in the batch; what differs between two
traces is interpolated. Scalars that enter arithmetic keep the global batch's value: a loss divided by the
batch size is divided by the global one whatever a microbatch holds.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes.graph import GraphInput, Meta, ModelGraph, copied_node
from passes.rewriter import GraphBuilder

if TYPE_CHECKING:
    from passes.trace import Traced

_SIZE_SCALARS = {"arange", "linspace", "range"}


class BatchMismatchError(ValueError):
    """The two traces are not one graph at two sizes: control flow or a shape depends on the batch in another way."""


def specialise(traced: Traced, batch: int) -> ModelGraph:
    """The forward graph for ``batch`` samples; the traced graph itself for the global batch."""
    return Specialiser(traced).whole(batch)


class Specialiser:
    """One traced graph at any batch size; what all sizes have in common is looked at once."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced

    def whole(self, batch: int) -> ModelGraph:
        """Every call. Errors: UnsupportedError, BatchMismatchError."""
        return self._affine(batch).run() if batch != self._batch else self.traced.global_graph

    def part(self, batch: int, names: Collection[str]) -> ModelGraph:
        """The named calls alone, what they read from others as inputs; errors are those of the whole graph."""
        if batch == self._batch:
            return self.traced.global_graph
        affine = self._affine(batch)
        span = self.traced.global_graph.batch - affine.other.batch
        for difference in self._differences:
            if difference * (batch - self._batch) % span:
                raise BatchMismatchError(
                    f"a size that differs by {difference} over {span} samples is broken at {batch}"
                )
        return affine.part(names)

    def tensor(self, name: str, batch: int) -> TensorMeta:
        """The meta of one value."""
        known = self.traced.global_graph.tensor(name)
        if batch == self._batch or self.traced.other is None:
            return known
        return self._affine(batch).tensor(known, self.traced.other.tensor(name))

    @property
    def _batch(self) -> int:
        return self.traced.global_graph.batch

    def _affine(self, batch: int) -> _Affine:
        whole, other = self.traced.global_graph, self.traced.other
        if other is None:
            notes = "; ".join(self.traced.notes)
            raise UnsupportedError(f"the batch of {whole.batch} cannot be split into parts of {batch}: {notes}")
        return _Affine(whole, other, batch, self.traced.twins)

    @cached_property
    def _differences(self) -> frozenset[int]:
        """By how much the sizes in the graph differ between the two traces; every node is compared."""
        survey = _Survey(self.traced.global_graph, self._affine(self._batch).other, self._batch, self.traced.twins)
        return survey.differences()


def twins(whole: ModelGraph, other: ModelGraph) -> dict[fx.Node, fx.Node]:
    """Every node of ``whole`` and the same node of ``other``; BatchMismatchError where they are not one graph."""
    if not are_twins(whole, other):
        raise BatchMismatchError("the model runs different ops at different batch sizes")
    return dict(zip(whole.graph.nodes, other.graph.nodes, strict=True))


def are_twins(whole: ModelGraph, other: ModelGraph) -> bool:
    """Whether two graphs are of the same calls."""
    same = len(whole.graph.nodes) == len(other.graph.nodes)
    return same and all(map(_are_alike, whole.graph.nodes, other.graph.nodes))


def named_like(graph: ModelGraph, like: ModelGraph) -> ModelGraph:
    """``graph`` under the names of ``like`` where both are of the same ops; names count dropped calls, too."""
    pairs = list(zip(graph.graph.nodes, like.graph.nodes, strict=False))
    alike = len(graph.graph.nodes) == len(like.graph.nodes) and all(
        (a.op, a.target) == (b.op, b.target) for a, b in pairs
    )
    if not alike or all(a.name == b.name for a, b in pairs):
        return graph
    names, copied, mapped = {a.name: b.name for a, b in pairs}, fx.Graph(), dict[fx.Node, fx.Node]()
    for node, twin in pairs:
        mapped[node] = copied_node(copied, node, mapped, twin.name)
    return replace(
        graph,
        graph=copied,
        metas={names[name]: meta for name, meta in graph.metas.items() if name in names},
        inputs=tuple(replace(entry, node=names[entry.node]) for entry in graph.inputs),
        outputs=tuple(names[name] for name in graph.outputs),
    )


def _are_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two calls are of one op on operands of the same names."""
    if one.op != other.op or one.target != other.target:
        return False
    return [n.name for n in one.all_input_nodes] == [n.name for n in other.all_input_nodes]


def changed_sizes(node: fx.Node, twin: fx.Node) -> list[str]:
    """Arguments of a call that are sizes and depend on the batch, by schema name."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    pairs = [(_name(node, i), a, b) for i, (a, b) in enumerate(zip(node.args, twin.args, strict=False))]
    pairs += [(name, value, twin.kwargs.get(name)) for name, value in node.kwargs.items()]
    return [name for name, a, b in pairs if _is_size(node, name) and not isinstance(a, fx.Node) and a != b]


def _name(node: fx.Node, position: int) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.arguments[position].name


def _is_size(node: fx.Node, name: str) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    return name in _sizes_of(node.target)


def _has_constants(node: fx.Node) -> bool:
    """Whether an op is given something beside results of other calls."""
    values = (*node.args, *node.kwargs.values())
    return isinstance(node.target, torch._ops.OpOverload) and not all(isinstance(each, fx.Node) for each in values)


@functools.cache
def _sizes_of(target: torch._ops.OpOverload) -> frozenset[str]:
    """Arguments that are declared as ints (SymInt in the schema), not as arithmetic Scalars."""
    schema = target._schema
    counts = schema.name.split("::")[1] in _SIZE_SCALARS
    return frozenset(a.name for a in schema.arguments if counts or "int" in str(a.type).lower())


class _Affine:
    """twins: every node of ``whole`` and the same node of ``other``."""

    def __init__(self, whole: ModelGraph, other: ModelGraph, batch: int, twins: dict[fx.Node, fx.Node]) -> None:
        self.whole, self.other, self.batch, self.twins = whole, other, batch, twins

    def run(self) -> ModelGraph:
        built, mapped = GraphBuilder(), {}
        for node, twin in self.twins.items():
            if node.op == "placeholder":
                mapped[node] = built.placeholder(node.name, self._meta(node, twin))
            elif node.op == "call_function":
                mapped[node] = self._copy(built, mapped, node, twin)
        built.graph.output(tuple(mapped[n] for n in self.whole.graph.nodes if n.name in self.whole.outputs))
        return ModelGraph(built.graph, built.metas, self.whole.inputs, self.whole.outputs, self.batch)

    def part(self, names: Collection[str]) -> ModelGraph:
        """Only the named calls, with placeholders for what they read of others."""
        built, mapped = GraphBuilder(), {}
        chosen = [n for n in self.twins if n.op == "call_function" and n.name in names]
        read = dict.fromkeys(o for n in chosen for o in n.all_input_nodes if o.name not in names)
        for node in read:
            mapped[node] = built.placeholder(node.name, self._meta(node, self.twins[node]))
        for node in chosen:
            mapped[node] = self._copy(built, mapped, node, self.twins[node])
        known = {i.node: i for i in self.whole.inputs}
        inputs = (known.get(n.name) or GraphInput(n.name, "activation", n.name, False, False) for n in read)
        return ModelGraph(built.graph, built.metas, tuple(inputs), (), self.batch)

    def tensor(self, a: TensorMeta, b: TensorMeta) -> TensorMeta:
        return self._blend_meta(a, b)

    def _copy(self, built: GraphBuilder, mapped: dict[fx.Node, Any], node: fx.Node, twin: fx.Node) -> fx.Node:
        made = built.copy(node, mapped, self._meta(node, twin))
        assert made.name == node.name
        if _has_constants(node):
            made.args, made.kwargs = self._arguments(made, twin)
        return made

    def _arguments(self, made: fx.Node, twin: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Those of a call, its operands as ``made`` has them."""
        pairs = enumerate(zip(made.args, twin.args, strict=True))
        args = tuple(self._blend(a, b, _is_size(made, _name(made, i))) for i, (a, b) in pairs)
        return args, {k: self._blend(v, twin.kwargs[k], _is_size(made, k)) for k, v in made.kwargs.items()}

    def _meta(self, node: fx.Node, twin: fx.Node) -> Meta:
        a, b = self.whole.metas[node.name], self.other.metas[twin.name]
        if isinstance(a, TensorMeta):
            assert isinstance(b, TensorMeta)
            return self._blend_meta(a, b)
        assert not isinstance(b, TensorMeta)
        return tuple(None if x is None or y is None else self._blend_meta(x, y) for x, y in zip(a, b, strict=True))

    def _blend_meta(self, a: TensorMeta, b: TensorMeta) -> TensorMeta:
        if a == b:
            return a
        if len(a.shape) != len(b.shape):
            raise BatchMismatchError("a tensor's rank depends on the batch")
        return TensorMeta(tuple(self._blend(x, y, True) for x, y in zip(a.shape, b.shape, strict=True)), a.dtype)

    def _blend(self, a: Any, b: Any, is_size: bool) -> Any:
        """``a`` belongs to the new graph already; lists of sizes blend elementwise, nodes and scalars stay."""
        if isinstance(a, list | tuple):
            return type(a)(self._blend(x, y, is_size) for x, y in zip(a, b, strict=True))
        if type(a) is not int or type(b) is not int:
            return self._fixed(a, b)
        if not is_size or a == b:
            return a
        return self._size(a, b)

    def _size(self, a: int, b: int) -> int:
        numerator = (a - b) * (self.batch - self.whole.batch)
        value, rest = divmod(numerator, self.whole.batch - self.other.batch)
        if rest:
            raise BatchMismatchError(f"a size of {a} at batch {self.whole.batch} is no whole number at {self.batch}")
        return a + value

    def _fixed(self, a: Any, b: Any) -> Any:
        """Numbers may differ, and the global batch's is meant; flags and names may not."""
        if not isinstance(a, float | fx.Node) and a != b:
            raise BatchMismatchError(
                f"an argument is {a!r} at batch {self.whole.batch} and {b!r} at {self.other.batch}"
            )
        return a


class _Survey(_Affine):
    """Compares all nodes at the global batch and remembers by how much sizes differ."""

    def __init__(self, whole: ModelGraph, other: ModelGraph, batch: int, twins: dict[fx.Node, fx.Node]) -> None:
        super().__init__(whole, other, batch, twins)
        self._found: set[int] = set()

    def differences(self) -> frozenset[int]:
        for node, twin in self.twins.items():
            if node.op != "output":
                self._meta(node, twin)
            if node.op == "call_function" and _has_constants(node):
                self._arguments(node, twin)
        return frozenset(self._found)

    def _size(self, a: int, b: int) -> int:
        self._found.add(a - b)
        return a
