"""Follow: strategies of a graph whose parameters lie on an axis already, chosen from the inputs on.

For a program without gradients: an op is split as its operands lie where that moves the fewest bytes now; what is
split stays split as long as ops have a rule for it. A planner looks further; here parameters decide most.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import fx

from cost_model.axes import Axes
from cost_model.factors import Strategy, unsplit_strategies
from cost_model.ops import entry_of
from cost_model.placement import BETWEEN_AXES, REPLICATE, Partial, Placement, Placements, Replicate, Shard
from cost_model.strategies import (
    MeshStrategy,
    follow,
    goes_together,
    parse_mesh_strategy,
    replicated,
    strategy_text,
)
from cost_model.tensor import TensorMeta
from passes.calls import call_of, tensor_args
from passes.dependence import active_nodes
from passes.graph import ModelGraph, is_getitem, op_name
from passes.shard import exit_key, input_key, op_key
from passes.vocabulary import collect

_SPLIT_PREFERENCE = 1e-3
"""Share of an output's bytes by which a strategy that leaves it split is preferred."""


def choices(
    model: ModelGraph, parameters: Mapping[str, Placements], whole: Collection[str], mesh: Axes
) -> dict[str, str]:
    """The choices of ``passes.shard`` for all stages. parameters: by node; whole: values that are whole at cuts.

    Each axis is followed by itself; a call that two axes would split in one place is split by the first alone.
    """
    alone = []
    for axis, size in enumerate(mesh.sizes):
        own = {node: places[axis] for node, places in parameters.items()}
        alone.append(_Follow(model, own, whole, size).run())
    joined = {key: BETWEEN_AXES.join(chosen[key] for chosen in alone) for key in alone[0]}
    calls = [n for n in model.nodes() if op_key(n.name) in joined] if len(alone) > 1 else []
    for node in calls:
        joined[op_key(node.name)] = str(_apart(model, node, parse_mesh_strategy(joined[op_key(node.name)]), mesh))
    return joined


def _apart(model: ModelGraph, node: fx.Node, wanted: MeshStrategy, mesh: Axes) -> MeshStrategy:
    """The strategy with whole work on each axis whose part of it does not go together with that of those before."""
    call = call_of(node, model.metas)
    plain = replicated(len(call.inputs), len(call.outputs))
    found = MeshStrategy((plain,) * len(wanted.axes))
    for axis, own in enumerate(wanted.axes):
        more = MeshStrategy((*found.axes[:axis], own, *found.axes[axis + 1 :]))
        found = more if goes_together(more, call.inputs, call.outputs, mesh.sizes) else found
    return found


class _Follow:
    def __init__(
        self, model: ModelGraph, parameters: Mapping[str, Placement], whole: Collection[str], size: int
    ) -> None:
        self.model, self.whole, self.size = model, whole, size
        self.active = active_nodes(model)
        self.places: dict[str, Placement] = {i.node: REPLICATE for i in model.inputs}
        self.places |= {node: place for node, place in parameters.items() if isinstance(place, Shard)}
        self.outputs: dict[str, tuple[Placement, ...]] = {}
        self.chosen = {input_key(node): str(place) for node, place in self.places.items()}

    def run(self) -> dict[str, str]:
        for node in self.model.nodes():
            if is_getitem(node):
                source, index = node.args
                assert isinstance(source, fx.Node) and isinstance(index, int)
                self._place(node, self.outputs[source.name][index])
            elif node.name in self.active:
                strategy = self._best(node)
                self.chosen[op_key(node.name)] = strategy_text(strategy)
                self.outputs[node.name] = strategy.outputs
                self._place(node, strategy.outputs[0])
            else:
                meta = self.model.metas[node.name]
                self.outputs[node.name] = (REPLICATE,) * (1 if isinstance(meta, TensorMeta) else len(meta))
                self.places[node.name] = REPLICATE
        return self.chosen

    def _place(self, node: fx.Node, place: Placement) -> None:
        """Where a value lies; what crosses a cut is whole, and is handed on so."""
        self.places[node.name] = REPLICATE if node.name in self.whole else place
        if node.name in self.whole:
            self.chosen[exit_key(node.name)] = str(REPLICATE)
        self.chosen[input_key(node.name)] = str(self.places[node.name])

    def _best(self, node: fx.Node) -> Strategy:
        operands, meta = tensor_args(node), self.model.metas[node.name]
        plain = replicated(len(operands), 1 if isinstance(meta, TensorMeta) else len(meta))
        entry = entry_of(op_name(node))
        rule = entry.factors(call_of(node, self.model.metas)) if entry and node.target is not collect else None
        if rule is None:
            return plain
        found = [plain]
        for index, operand in enumerate(operands):
            place = self.places[operand.name]
            if isinstance(place, Shard):
                found += [s for s in (follow(rule, "in", index, place, self.size),) if s is not None]
        fixed = unsplit_strategies(rule, len(operands), len(plain.outputs))
        found += [s for s in fixed if any(isinstance(place, Partial) for place in s.outputs)]
        return min(found, key=lambda strategy: self._bytes(node, operands, strategy))

    def _bytes(self, node: fx.Node, operands: list[fx.Node], strategy: Strategy) -> float:
        """What a strategy moves, less a little where it keeps its result split."""
        meta = self.model.metas[node.name]
        outputs = [meta] if isinstance(meta, TensorMeta) else list(meta)
        split = sum(m.nbytes for m, p in zip(outputs, strategy.outputs, strict=True) if m and isinstance(p, Shard))
        wanted = zip(operands, strategy.inputs, strict=True)
        return sum(self._moved(o, place) for o, place in wanted) - _SPLIT_PREFERENCE * split

    def _moved(self, operand: fx.Node, wanted: Placement) -> float:
        """Bytes on the wire, as a share of the whole tensor; values without parameters are at hand everywhere."""
        source, nbytes = self.places[operand.name], self.model.tensor(operand.name).nbytes
        if source == wanted or isinstance(source, Replicate):
            return 0.0
        if isinstance(wanted, Partial):
            return math.inf
        return nbytes * (2 if isinstance(source, Partial) and not isinstance(wanted, Shard) else 1)
