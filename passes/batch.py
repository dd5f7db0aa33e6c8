"""Analyse the batch: prove that shards and microbatches of the batch add up to the global loss.

Splitting the batch is one more axis on which every value has a placement: inputs are Shard(0), parameters
Varying (their gradients add up), the loss Partial. Nothing is chosen: placements follow forward from the
inputs. A value that depends on the whole batch but on no parameter (the count of labels) is computed once per
step from the global batch; a value that needs the whole batch otherwise means that the batch cannot be split.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from cost_model.factors import FactorMap, factor_of, split_factor
from cost_model.ops import entry_of
from cost_model.placement import PARTIAL, REPLICATE, VARYING, Partial, Placement, Shard
from cost_model.tensor import TensorMeta
from passes.calls import call_of, tensor_args
from passes.dependence import active_nodes
from passes.graph import ModelGraph, is_getitem


@dataclass(frozen=True)
class BatchAnalysis:
    """reason: why the batch cannot be split, None if it can.

    hoisted: ambient nodes to compute once per step from the global batch, in execution order.
    sliced: those of them that have the batch as dim 0 and are sliced per microbatch like inputs.
    shared: (user, operand) pairs where a value that knows no batch joins a sum over it: scaled by local / global.
    constant: (ambient node, dim) pairs assumed equal along the batch, to be checked by evaluation.
    """

    reason: str | None
    hoisted: tuple[str, ...]
    sliced: frozenset[str]
    shared: frozenset[tuple[str, str]]
    constant: tuple[tuple[str, int], ...]


class _CannotSplit(Exception):
    pass


@dataclass(frozen=True)
class _Global:
    """Placement of an ambient value that must be computed from the global batch."""


def analyse_batch(model: ModelGraph) -> BatchAnalysis:
    """Follow the batch through the global graph."""
    run = _Analysis(model)
    try:
        run.follow()
    except _CannotSplit as error:
        return BatchAnalysis(str(error), (), frozenset(), frozenset(), ())
    return run.result()


class _Analysis:
    def __init__(self, model: ModelGraph) -> None:
        self.model, self.active = model, active_nodes(model)
        self.places: dict[str, Placement | _Global] = {}
        self.outputs_of: dict[str, tuple[Placement, ...] | _Global] = {}
        self.hoisted: set[str] = set()
        self.sliced: set[str] = set()
        self.shared: set[tuple[str, str]] = set()
        self.constant: dict[tuple[str, int], None] = {}
        for item in model.inputs:
            if item.kind == "batch" and item.batched:
                self.places[item.node] = Shard(0)
            else:
                self.places[item.node] = VARYING if item.kind == "parameter" else REPLICATE

    def follow(self) -> None:
        for node in self.model.nodes():
            if is_getitem(node):
                self.places[node.name] = self._item(node)
            else:
                self.places[node.name] = self._place(node)
        loss = self.places[self.model.outputs[0]]
        if not isinstance(loss, Partial) and loss != VARYING:
            raise _CannotSplit(f"the loss is {loss} over the batch, not a sum over samples")
        if loss == VARYING:
            raise _CannotSplit("the loss does not depend on the batch")

    def _item(self, node: fx.Node) -> Placement | _Global:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        place = self.outputs_of[source.name]
        return place if isinstance(place, _Global) else place[index]

    def _place(self, node: fx.Node) -> Placement | _Global:
        operands = tensor_args(node)
        places = [self.places[o.name] for o in operands]
        ambient = node.name not in self.active
        try:
            outputs = self._strategy(node, operands, places, ambient)
        except _CannotSplit:
            if not ambient:
                raise
            outputs = (PARTIAL,)
        if ambient and PARTIAL in outputs:
            self.outputs_of[node.name] = _Global()
            return _Global()
        self.outputs_of[node.name] = outputs
        return outputs[0]

    def _strategy(
        self, node: fx.Node, operands: list[fx.Node], places: list[Placement | _Global], ambient: bool
    ) -> tuple[Placement, ...]:
        rest = REPLICATE if ambient else VARYING
        outs = self.model.metas[node.name]
        count = 1 if isinstance(outs, TensorMeta) else len([m for m in outs if m is not None])
        if any(isinstance(p, Partial) for p in places):
            return self._linear(node, operands, places, count)
        split = [(i, p) for i, p in enumerate(places) if isinstance(p, Shard)]
        if not split:
            if ambient and any(isinstance(p, _Global) for p in places):
                raise _CannotSplit("ambient")
            self._hoist_globals(operands, places)
            return (rest,) * count
        return self._split(node, operands, places, split[0])

    def _rule(self, node: fx.Node) -> FactorMap:
        entry = entry_of(str(node.target))
        rule = entry.factors(call_of(node, self.model.metas)) if entry else None
        if rule is None:
            raise _CannotSplit(f"{node.target} has no rule for its batch dim ({_source(node)})")
        return rule

    def _split(
        self, node: fx.Node, operands: list[fx.Node], places: list[Placement | _Global], first: tuple[int, Shard]
    ) -> tuple[Placement, ...]:
        rule = self._rule(node)
        found = factor_of(rule, "in", first[0], first[1])
        strategy = split_factor(rule, found[0], found[1], rule.sizes[found[0]] // found[1]) if found else None
        if strategy is None or strategy.inside:
            raise _CannotSplit(f"{node.target} mixes samples of the batch ({_source(node)})")
        for operand, place, wanted in zip(operands, places, strategy.inputs, strict=True):
            self._accept(node, operand, place, wanted)
        return strategy.outputs

    def _accept(self, node: fx.Node, operand: fx.Node, place: Placement | _Global, wanted: Placement) -> None:
        """One operand of an op that is split along the batch."""
        if isinstance(wanted, Partial):
            if place not in (VARYING, REPLICATE):
                raise _CannotSplit(f"{node.target} adds {operand} ({place}) to a sum over the batch")
            self.shared.add((node.name, operand.name))
        elif isinstance(place, _Global):
            self.hoisted.add(operand.name)
            if isinstance(wanted, Shard):
                if wanted != Shard(0):
                    raise _CannotSplit(f"{operand} holds the batch in another dim than 0")
                self.sliced.add(operand.name)
        elif isinstance(wanted, Shard) and place != wanted:
            if place != REPLICATE or operand.name in self.active or operand.op == "placeholder":
                raise _CannotSplit(f"{node.target} needs {operand} split along the batch, but it is {place}")
            self.constant[(operand.name, wanted.dim)] = None
        elif not isinstance(wanted, Shard) and isinstance(place, Shard):
            raise _CannotSplit(f"{node.target} needs all samples of {operand} ({_source(node)})")

    def _linear(
        self, node: fx.Node, operands: list[fx.Node], places: list[Placement | _Global], count: int
    ) -> tuple[Placement, ...]:
        partial = {i for i, p in enumerate(places) if isinstance(p, Partial)}
        rule = self._rule(node)
        groups = [g for g in rule.linear if partial <= g]
        if not groups:
            raise _CannotSplit(f"{node.target} is not linear in a sum over the batch ({_source(node)})")
        group = min(groups, key=len)
        for index, (operand, place) in enumerate(zip(operands, places, strict=True)):
            if isinstance(place, Shard):
                raise _CannotSplit(f"{node.target} combines a sum over the batch with samples of it ({_source(node)})")
            if index in group and index not in partial:
                self.shared.add((node.name, operand.name))
        self._hoist_globals(operands, places)
        return (PARTIAL,) * count

    def _hoist_globals(self, operands: list[fx.Node], places: list[Placement | _Global]) -> None:
        self.hoisted.update(o.name for o, p in zip(operands, places, strict=True) if isinstance(p, _Global))

    def result(self) -> BatchAnalysis:
        order = tuple(n.name for n in self.model.nodes() if n.name in self.hoisted)
        return BatchAnalysis(None, order, frozenset(self.sliced), frozenset(self.shared), tuple(self.constant))


def _source(node: fx.Node) -> str:
    """The user's line, from the trace."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    return " ".join(lines[-2:]) if lines else "no source line"
