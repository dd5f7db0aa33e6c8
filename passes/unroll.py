"""Unroll: calls of ``autopar.repeated`` in an exported graph become the calls of the module they repeat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from passes.graph import copied_node
from passes.hidden import Hidden
from passes.repeats import FIRST, HiddenError, Repeats, is_plain, repeated
from passes.templates import UnlikeError

_NUMBERED = re.compile(r"(.*?)(?:_(\d+))?$")
_NOT_OF_NAMES = re.compile(r"[^a-z0-9]")


def unroll(exported: torch.export.ExportedProgram, repeats: Repeats) -> None:
    """In place; every node is called as in a full trace. Errors: UnlikeError where that cannot be had."""
    graph = exported.graph_module.graph
    calls = [_arguments(n) for n in graph.nodes if n.target is repeated]
    if {call.run for call in calls} - {FIRST} != set(range(len(repeats.shifts))):
        raise UnlikeError  # one is in a part of the graph of its own
    if calls:
        inputs = _shown(exported, repeats.hidden)
        _Unrolling(graph, repeats, inputs).run()


def _shown(exported: torch.export.ExportedProgram, hidden: Hidden) -> dict[str, fx.Node]:
    """Hidden parameters as inputs, in their places among the others, called as they would be: name -> placeholder."""
    graph, specs = exported.graph_module.graph, exported.graph_signature.input_specs
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    known = {spec.target: spec for spec in specs if spec.kind == InputKind.PARAMETER}
    others = [spec for spec in specs if spec.kind != InputKind.PARAMETER]
    made: dict[str, fx.Node] = {}
    ordered = []
    place = next(iter(nodes.values()))
    for target in hidden.order:
        if target in known:
            place = nodes[known[target].arg.name].next
            ordered.append(known[target])
            continue
        name = "p_" + _NOT_OF_NAMES.sub("_", target.lower())
        with graph.inserting_before(place):
            node = made[target] = graph.create_node("placeholder", name, (), name=name)
        if node.name != name:
            raise HiddenError  # names would be told apart otherwise
        node.meta = dict(nodes[known[hidden.twins[target]].arg.name].meta)
        ordered.append(InputSpec(InputKind.PARAMETER, TensorArgument(name), target))
        exported.state_dict[target] = hidden.tensors[target]
    specs[:] = [*ordered, *others]
    return made


class _Arguments(NamedTuple):
    """Of a call of ``repeated``."""

    values: list[fx.Node]
    template: int
    run: int
    place: int


def _arguments(node: fx.Node) -> _Arguments:
    return _Arguments(*node.args)  # type: ignore[arg-type]


class _Call(NamedTuple):
    """Of a template: a node, its name without its number, that number, and the number of its modules' stack."""

    node: fx.Node
    base: str
    number: int
    stack: int


class _Body(NamedTuple):
    """Of a template: the call of ``repeated`` of its full trace, its calls in order, and the modules they lie in."""

    first: fx.Node
    calls: list[_Call]
    stacks: list[dict[str, Any]]


class _Unrolling:
    """inputs: the hidden parameters. bodies: by template."""

    def __init__(self, graph: fx.Graph, repeats: Repeats, inputs: Mapping[str, fx.Node]) -> None:
        self.graph, self.repeats, self.inputs = graph, repeats, inputs
        self.bodies: dict[int, _Body] = {}
        self.laid: dict[int, dict[fx.Node, fx.Node]] = {}

    def run(self) -> None:
        calls = [node for node in self.graph.nodes if node.target is repeated]
        results = [self._learn(c) if _arguments(c).run == FIRST else self._repeat(c) for c in calls]
        for call, result in zip(calls, results, strict=True):
            call.replace_all_uses_with(result)
        for call in reversed(calls):
            self.graph.erase_node(call)

    def _learn(self, node: fx.Node) -> fx.Node:
        """Of the first run, what the node stands for."""
        values, number, _, place = _arguments(node)
        outside = len(self.repeats.templates[number].outside)
        if number not in self.bodies:
            self.bodies[number] = _body(node, self._made_of(values[:outside], values[outside:]))
        return values[outside + place]

    def _made_of(self, outside: list[fx.Node], made: list[fx.Node]) -> list[fx.Node]:
        """All that the made values depend on, up to those from outside."""
        found, stack = set[fx.Node](), list(made)
        while stack:
            node = stack.pop()
            if node in found or node in outside:
                continue
            if not is_plain(node):
                raise UnlikeError
            found.add(node)
            stack += node.all_input_nodes
        return [node for node in self.graph.nodes if node in found]

    def _repeat(self, node: fx.Node) -> fx.Node:
        _, number, run, place = _arguments(node)
        known, outside = _arguments(self.bodies[number].first).values, len(self.repeats.templates[number].outside)
        if run not in self.laid:
            self.laid[run] = self._lay(number, dict(zip(known, self._read(node), strict=False)), node)
        return self.laid[run][known[outside + place]]

    def _read(self, node: fx.Node) -> Sequence[fx.Node]:
        """What the repetition reads, hidden parameters too."""
        seen, _, run, _ = _arguments(node)
        rest = iter(seen)
        return [next(rest) if name is None else self.inputs[name] for name in self.repeats.reads[run]]

    def _lay(self, number: int, outside: Mapping[fx.Node, fx.Node], call: fx.Node) -> dict[fx.Node, fx.Node]:
        laid, body = dict(outside), self.bodies[number]
        shift = self.repeats.shifts[_arguments(call).run]
        stacks = [_moved(stack, body.first, call) for stack in body.stacks]
        with self.graph.inserting_before(call):
            for node, base, place, stack in body.calls:
                laid[node] = made = copied_node(self.graph, node, laid, f"{base}_{place + shift[base]}")
                made.meta["nn_module_stack"] = stacks[stack]
        return laid


def _body(first: fx.Node, nodes: list[fx.Node]) -> _Body:
    stacks: dict[tuple[Any, ...], int] = {}
    calls = []
    for node in nodes:
        match = _NUMBERED.fullmatch(node.name)
        assert match is not None
        base, number = match.groups()
        stack = stacks.setdefault(tuple(node.meta["nn_module_stack"].items()), len(stacks))
        calls.append(_Call(node, base, int(number or 0), stack))
    return _Body(first, calls, [dict(stack) for stack in stacks])


def _moved(stack: dict[str, Any], first: fx.Node, call: fx.Node) -> dict[str, Any]:
    """The modules a repeated node lies in: those of its module, then those within, under that one's name."""
    before, after = first.meta["nn_module_stack"], call.meta["nn_module_stack"]
    old, new = (list(each.values())[-1][0] for each in (before, after))
    inner = {key: entry for key, entry in stack.items() if key not in before}
    moved = {key.replace(old, new, 1): (path.replace(old, new, 1), kind) for key, (path, kind) in inner.items()}
    return {**after, **moved}
