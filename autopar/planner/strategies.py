"""Which strategies each op of a segment has on one mesh axis, found by following shards through the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from cost_model.factors import FactorMap, Strategy
from cost_model.ops import OpCall, entry_of
from cost_model.placement import Partial, Placement, Shard
from cost_model.strategies import follow, replicated, seeds, unsplit
from cost_model.tensor import TensorMeta
from passes.calls import call_of, tensor_args
from passes.graph import ModelGraph, is_getitem

SEQUENCE = Shard(1)
"""How values [batch, sequence, features] lie under sequence parallelism."""


@dataclass(frozen=True)
class PlannedOp:
    """operands: node names in schema order; call: whole metas; strategies: in the order that breaks ties."""

    node: str
    operands: tuple[str, ...]
    call: OpCall
    strategies: tuple[Strategy, ...] = field(hash=False)


@dataclass(frozen=True)
class OpSpace:
    """ops: in execution order; values: tensor (node name) -> (op name, output index) that makes it;
    shards: tensor -> the shards any strategy gives or wants."""

    ops: tuple[PlannedOp, ...]
    values: Mapping[str, tuple[str, int]] = field(hash=False)
    shards: Mapping[str, tuple[Shard, ...]] = field(hash=False)


def op_space(model: ModelGraph, nodes: tuple[str, ...], ambient: frozenset[str], size: int) -> OpSpace:
    """The strategies of ``nodes`` for an axis of ``size`` ranks; ``ambient`` values take any form for free."""
    return _Enumeration(model, nodes, ambient, size).run()


class _Enumeration:
    def __init__(self, model: ModelGraph, nodes: tuple[str, ...], ambient: frozenset[str], size: int) -> None:
        self.model, self.ambient, self.size = model, ambient, size
        chosen = set(nodes)
        all_nodes = [n for n in model.nodes() if n.name in chosen]
        self.nodes = [n for n in all_nodes if not is_getitem(n)]
        self.values: dict[str, tuple[str, int]] = {}
        self.operands: dict[str, list[str]] = {}
        self.calls: dict[str, OpCall] = {}
        self.rules: dict[str, FactorMap | None] = {}
        self.found: dict[str, dict[Strategy, None]] = {}
        self.shards: dict[str, dict[Shard, None]] = {}
        self.uses: dict[str, list[tuple[str, int]]] = {}
        for node in all_nodes:
            self._index(node)

    def _index(self, node: fx.Node) -> None:
        if is_getitem(node):
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            self.values[node.name] = (source.name, index)
            return
        self.values[node.name] = (node.name, 0)
        self.operands[node.name] = [o.name for o in tensor_args(node)]
        for index, operand in enumerate(self.operands[node.name]):
            self.uses.setdefault(operand, []).append((node.name, index))
        call = self.calls[node.name] = call_of(node, self.model.metas)
        entry = entry_of(call.op)
        self.rules[node.name] = entry.factors(call) if entry is not None else None
        self.found[node.name] = {}

    def run(self) -> OpSpace:
        queue: list[tuple[str, Strategy]] = []
        if self.size > 1:
            for name, rule in self.rules.items():
                queue += [(name, s) for s in seeds(rule, self.size)] if rule is not None else []
        while queue:
            name, strategy = queue.pop()
            if strategy not in self.found[name] and self._consistent(name, strategy):
                self.found[name][strategy] = None
                queue += self._spread(name, strategy)
        ops = tuple(self._planned(n.name) for n in self.nodes)
        return OpSpace(ops, self.values, {t: tuple(sorted(s)) for t, s in self.shards.items()})

    def _planned(self, name: str) -> PlannedOp:
        call = self.calls[name]
        num_inputs, num_outputs = len(call.inputs), len(call.outputs)
        if self.size == 1:
            strategies: tuple[Strategy, ...] = (replicated(num_inputs, num_outputs),)
        else:
            fixed = (s for s in unsplit(self.rules[name], num_inputs, num_outputs) if _has_terms(call, s))
            split = sorted(self.found[name], key=lambda s: (s.factor, str(s)))
            strategies = tuple(s for s in (*fixed, *split) if self._consistent(name, s))
        return PlannedOp(name, tuple(self.operands[name]), call, _distinct(strategies))

    def _consistent(self, name: str, strategy: Strategy) -> bool:
        """One operand used twice must be wanted in one form."""
        wanted: dict[str, Placement] = {}
        pairs = zip(self.operands[name], strategy.inputs, strict=True)
        return all(wanted.setdefault(operand, place) == place for operand, place in pairs)

    def _spread(self, name: str, strategy: Strategy) -> list[tuple[str, Strategy]]:
        """Strategies of neighbours that take or give the shards of this one as they are."""
        made: list[tuple[str, Strategy]] = []
        for operand, place in zip(self.operands[name], strategy.inputs, strict=True):
            if isinstance(place, Shard) and operand not in self.ambient:
                made += self._offer(operand, place)
        outputs = [t for t, (op, _) in self.values.items() if op == name]
        for tensor in outputs:
            place = strategy.outputs[self.values[tensor][1]]
            if isinstance(place, Shard) and isinstance(self.model.metas[tensor], TensorMeta):
                made += self._offer(tensor, place)
        return made

    def _offer(self, tensor: str, shard: Shard) -> list[tuple[str, Strategy]]:
        known = self.shards.setdefault(tensor, {})
        if shard in known:
            return []
        known[shard] = None
        made = [(op, self._follow(op, "in", index, shard)) for op, index in self.uses.get(tensor, [])]
        if tensor in self.values:
            op, index = self.values[tensor]
            made.append((op, self._follow(op, "out", index, shard)))
        return [(op, strategy) for op, strategy in made if strategy is not None]

    def _follow(self, op: str, side: str, index: int, shard: Shard) -> Strategy | None:
        rule = self.rules[op]
        return None if rule is None else follow(rule, side, index, shard, self.size)


def _distinct(strategies: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
    """Without strategies that want and give the same; the first of equals stays."""
    known: dict[tuple[object, ...], Strategy] = {}
    for strategy in strategies:
        known.setdefault((strategy.inputs, strategy.outputs, strategy.inside), strategy)
    return tuple(known.values())


def along_sequence(space: OpSpace, starts: Iterable[str]) -> set[tuple[str, Shard]]:
    """(tensor, shard) pairs that split the sequence: reached from ``starts``, values [batch, sequence, features], by
    strategies that give or take such a pair."""
    pairs = {op.node: [(s, _shards_of(space, op, s)) for s in op.strategies] for op in space.ops}
    users: dict[str, list[str]] = {}
    for op in space.ops:
        for tensor in {*op.operands, *(t for t, (maker, _) in space.values.items() if maker == op.node)}:
            users.setdefault(tensor, []).append(op.node)
    found = {(tensor, SEQUENCE) for tensor in starts}
    queue = list(found)
    while queue:
        pair = queue.pop()
        for op_name in users.get(pair[0], []):
            new = {p for _, known in pairs[op_name] if pair in known for p in known} - found
            found |= new
            queue += new
    return found


def _shards_of(space: OpSpace, op: PlannedOp, strategy: Strategy) -> set[tuple[str, Shard]]:
    made = [(t, strategy.outputs[index]) for t, (maker, index) in space.values.items() if maker == op.node]
    return {(t, p) for t, p in (*zip(op.operands, strategy.inputs, strict=True), *made) if isinstance(p, Shard)}


def pin_sequence(space: OpSpace, starts: Iterable[str], *, split: bool) -> OpSpace:
    """split: no op that could split the sequence does the whole of it on every rank; else none splits the sequence."""
    along = along_sequence(space, starts)

    def keeps(op: PlannedOp, strategy: Strategy) -> bool:
        if not split:
            return not along & _shards_of(space, op, strategy)
        is_whole = not any(isinstance(p, Shard | Partial) for p in (*strategy.inputs, *strategy.outputs))
        return not is_whole or not any(along & _shards_of(space, op, s) for s in op.strategies)

    ops = tuple(replace(op, strategies=tuple(s for s in op.strategies if keeps(op, s))) for op in space.ops)
    shards = {t: tuple(s for s in known if split or (t, s) not in along) for t, known in space.shards.items()}
    return OpSpace(ops, space.values, shards)


def _has_terms(call: OpCall, strategy: Strategy) -> bool:
    """Whether what is wanted as terms of a sum can be: whole numbers and truths have no equal parts."""
    pairs = zip(call.inputs, strategy.inputs, strict=True)
    return all(meta.has_gradient for meta, place in pairs if isinstance(place, Partial))
