"""Split: a joint graph becomes setup (once), forward and backward (per microbatch) with a chosen set of saved values.

Saved are the bases the backward reads; views of them are redone there, and so is what ``passes.recompute`` picks, each
value just before its first use. What depends on nothing but buffers and
constants (masks, position ids) moves to setup and is computed once. Uses of a forward value for its shape alone
keep nothing alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from passes import vocabulary
from passes.graph import copied_node
from passes.joint import JointGraph
from passes.pieces import AMBIENT
from passes.recompute import remade
from passes.storage import is_view, rebased, renamed

aten = torch.ops.aten
_SHAPE_ONLY = {aten.ones_like.default: 1, aten.zeros_like.default: 0}
_AGAIN = "again"
_SAVE_ALL: Mapping[int, str] = {}


@dataclass(frozen=True)
class SplitGraphs:
    """Graphs share node names. ``saved``: forward values the backward takes, in forward order;
    ``constants``: setup values either reads. ``backward`` adds parameter gradients to their buffers as they are
    finished and returns the gradient of the activation received, if there is one. Where ``weight`` is there, that one
    adds gradients to their buffers, from values that ``backward`` keeps for it (see ``passes.split_weight``).
    """

    setup: fx.Graph
    forward: fx.Graph
    backward: fx.Graph
    inputs: tuple[str, ...]
    grad_in: str | None
    output: str
    saved: tuple[str, ...]
    constants: tuple[str, ...]
    weight: fx.Graph | None = None
    kept: tuple[str, ...] = ()

    @property
    def backwards(self) -> tuple[fx.Graph, ...]:
        """One graph, or two."""
        return (self.backward,) if self.weight is None else (self.backward, self.weight)


def split(
    joint: JointGraph, invariant: frozenset[str], parameters: Mapping[str, str], levels: Mapping[int, str] = _SAVE_ALL
) -> SplitGraphs:
    """``invariant``: inputs that never change (buffers, constants); ``parameters``: input node -> the model's name;
    ``levels``: segment -> how much of it is recomputed."""
    return _Split(joint, invariant, parameters, levels).run()


class _Split:
    def __init__(
        self, joint: JointGraph, invariant: frozenset[str], parameters: Mapping[str, str], levels: Mapping[int, str]
    ) -> None:
        joint = _without_detach(joint)
        self.joint, self.parameters, self.levels = joint, parameters, levels
        nodes = list(joint.graph.nodes)
        self.by_name = {n.name: n for n in nodes}
        mark = self.by_name[joint.mark]
        at = nodes.index(mark)
        self.inputs = {n for n in nodes if n.op == "placeholder"}
        calls = [n for n in nodes if n.op == "call_function" and n is not mark]
        self.setup_nodes = _invariant_calls(calls, {n for n in self.inputs if n.name in invariant})
        position = {n: i for i, n in enumerate(nodes)}
        self.forward_nodes = [n for n in calls if position[n] < at and n not in self.setup_nodes]
        self.backward_nodes = [n for n in calls if position[n] > at and n not in self.setup_nodes]
        self.forward_set = set(self.forward_nodes)
        self.constants: dict[str, None] = {}
        self.saved: dict[str, None] = {}
        self.remade: frozenset[fx.Node] = frozenset()

    def run(self) -> SplitGraphs:
        backward = self._backward([v for v in self.joint.gradients.values() if v is not None])
        forward = self._forward()
        order = [n.name for n in self.forward_nodes if n.name in self.saved]
        return SplitGraphs(
            setup=self._setup(),
            forward=forward,
            backward=backward,
            inputs=self.joint.inputs,
            grad_in=self.joint.grad_in,
            output=self.joint.output,
            saved=tuple(order),
            constants=tuple(self.constants),
        )

    def _backward(self, results: list[str]) -> fx.Graph:
        """Backward nodes that lead to a gradient; operands from forward become saved values or redone views."""
        needed = reaching([self.by_name[name] for name in results], set(self.backward_nodes))
        self.remade = self._remade(needed, results)
        graph, mapped = fx.Graph(), {}
        for node in self.backward_nodes:
            if node not in needed:
                continue
            if node.target in _SHAPE_ONLY:
                mapped[node] = _filled(graph, node, _SHAPE_ONLY[node.target])
                continue
            for operand in node.all_input_nodes:
                self._bring(operand, graph, mapped)
            mapped[node] = copied(graph, node, mapped)
        outside = [self.by_name[name] for name in results if self.by_name[name] not in mapped]
        for node in outside:
            self._bring(node, graph, mapped)
        received = [v for k, v in self.joint.gradients.items() if v is not None and k not in self.parameters]
        graph.output(tuple(mapped[self.by_name[name]] for name in received))
        for parameter, name in self.joint.gradients.items():
            if name is not None and parameter in self.parameters:
                _accumulate(graph, mapped[self.by_name[name]], self.parameters[parameter])
        return inputs_first(graph)

    def _remade(self, needed: set[fx.Node], results: list[str]) -> frozenset[fx.Node]:
        """Forward calls that are made again, given what the backward reads of the forward."""
        read = {o for n in needed if n.target not in _SHAPE_ONLY for o in n.all_input_nodes if o in self.forward_set}
        read |= {self.by_name[name] for name in results} & self.forward_set
        return remade(self.forward_nodes, read, self.levels, {n for n in self.inputs if n.name in self.parameters})

    def _bring(self, wanted: fx.Node, graph: fx.Graph, mapped: dict[fx.Node, Any]) -> None:
        """Make a value available in backward: an input, a constant, a saved value, or one made again (as views are)
        after all that it is made of."""
        stack = [wanted]
        while stack:
            node = stack[-1]
            again = node in self.remade or (node in self.forward_set and is_view(node))
            missing = [o for o in reversed(node.all_input_nodes) if o not in mapped] if again else []
            if node in mapped or not missing:
                stack.pop()
            if node not in mapped and not missing:
                mapped[node] = self._copy_again(graph, node, mapped) if again else self._taken(graph, node)
            elif node not in mapped:
                stack += missing

    def _copy_again(self, graph: fx.Graph, node: fx.Node, mapped: dict[fx.Node, Any]) -> fx.Node:
        """A second copy has memory of its own."""
        made = copied(graph, node, mapped)
        if not is_view(node):
            made.meta["storage"] = renamed(node.meta["storage"], lambda storage: (_AGAIN, storage))
        if made.meta["storage"] != node.meta["storage"]:
            made.name = f"{node.name}_{_AGAIN}"
        return made

    def _taken(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """An input, a constant or a saved value."""
        if node in self.setup_nodes:
            self.constants[node.name] = None
        elif node in self.forward_set:
            assert isinstance(node.meta.get("val"), torch.Tensor), f"{node} is saved whole"
            self.saved[node.name] = None
        return placeholder(graph, node)

    def _forward(self) -> fx.Graph:
        results = [self.by_name[name] for name in (self.joint.output, *self.saved)]
        needed = reaching(results, self.forward_set)
        graph, mapped = fx.Graph(), {}
        for node in [*(n for n in self.forward_nodes if n in needed)]:
            for operand in node.all_input_nodes:
                if operand not in mapped:
                    if operand in self.setup_nodes:
                        self.constants[operand.name] = None
                    mapped[operand] = placeholder(graph, operand)
            mapped[node] = copied(graph, node, mapped)
        order = [n.name for n in self.forward_nodes if n.name in self.saved]
        graph.output((mapped[self.by_name[self.joint.output]], *(mapped[self.by_name[n]] for n in order)))
        return inputs_first(graph)

    def _setup(self) -> fx.Graph:
        results = [self.by_name[name] for name in self.constants]
        needed = reaching(results, self.setup_nodes)
        graph, mapped = fx.Graph(), {}
        for node in self.joint.graph.nodes:
            if node in needed:
                for operand in node.all_input_nodes:
                    if operand not in mapped:
                        mapped[operand] = placeholder(graph, operand)
                mapped[node] = copied(graph, node, mapped)
        graph.output(tuple(mapped[r] for r in results))
        return inputs_first(graph)


def _without_detach(joint: JointGraph) -> JointGraph:
    """The joint graph, changed in place; a value that is handed over where a gradient would be may be detached too."""
    stand_for: dict[str | None, str] = {}
    for node in list(joint.graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            stand_for[node.name] = source.name
            node.replace_all_uses_with(source)
            joint.graph.erase_node(node)
    return replace(joint, gradients={name: stand_for.get(g, g) for name, g in joint.gradients.items()})


def _invariant_calls(calls: list[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    """Calls whose operands are all invariant; random ones are not, nor is what another call writes to."""
    invariant: set[fx.Node] = set()
    written = {o for n in calls if _writes(n) for o in n.all_input_nodes}
    for node in calls:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not random and node not in written and all(o in invariant or o in known for o in node.all_input_nodes):
            invariant.add(node)
    return invariant


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def reaching(results: list[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """Nodes of ``within`` that the results need."""
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node in within and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def copied(graph: fx.Graph, node: fx.Node, mapped: dict[fx.Node, Any]) -> fx.Node:
    """A view lies in the memory that its operand has in the graph."""
    made = copied_node(graph, node, mapped)
    if made.name != node.name:
        made.name = node.name
    made.meta["storage"] = rebased(node.meta.get("storage"), ((o, mapped[o]) for o in node.all_input_nodes))
    return made


def placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.placeholder(node.name)
    if made.name != node.name:
        made.name = node.name
    made.meta.update(node.meta)
    return made


def _filled(graph: fx.Graph, node: fx.Node, value: int) -> fx.Node:
    """ones_like(x) -> full(shape of x): nothing of x but its shape is needed."""
    like = node.meta["val"]
    kwargs = {"dtype": like.dtype, "device": torch.device("cpu")}
    made = graph.call_function(aten.full.default, (list(like.shape), value), kwargs)
    made.meta = dict(node.meta)
    return made


def _accumulate(graph: fx.Graph, gradient: fx.Node, parameter: str) -> None:
    """Right after a gradient is complete, so that it dies at once."""
    first = None
    if gradient.op == "placeholder":
        first = next((n for n in graph.nodes if n.op == "call_function"), None)
    with graph.inserting_after(gradient) if first is None else graph.inserting_before(first):
        made = graph.call_function(vocabulary.accumulate, (gradient, parameter))
    made.meta = {k: gradient.meta[k] for k in ("label", "nn_module_stack") if k in gradient.meta}
    made.meta["segment"] = gradient.meta.get("segment", AMBIENT)


def inputs_first(graph: fx.Graph) -> fx.Graph:
    """Placeholders moved to the front, as fx wants them."""
    calls = [n for n in graph.nodes if n.op != "placeholder"]
    if calls:
        for node in [n for n in graph.nodes if n.op == "placeholder"]:
            calls[0].prepend(node)
    graph.lint()
    return graph
