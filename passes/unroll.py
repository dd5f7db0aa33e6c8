"""Unroll: calls of ``autopar.repeated`` in an exported graph become the calls of the module they repeat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import fx

from passes.repeats import FIRST, Repeats, UnlikeError, is_plain, repeated

_NUMBERED = re.compile(r"(.*?)(?:_(\d+))?$")


def unroll(module: fx.GraphModule, repeats: Repeats) -> None:
    """In place; every node is called as in a full trace. Errors: UnlikeError where that cannot be had."""
    calls = [_arguments(n) for n in module.graph.nodes if n.target is repeated]
    if {call.run for call in calls} - {FIRST} != set(range(len(repeats.shifts))):
        raise UnlikeError  # one is in a part of the graph of its own
    if calls:
        module.graph = _Unrolling(module.graph, repeats).run()


class _Arguments(NamedTuple):
    """Of a call of ``repeated``."""

    values: list[fx.Node]
    template: int
    run: int
    place: int


def _arguments(node: fx.Node) -> _Arguments:
    return _Arguments(*node.args)  # type: ignore[arg-type]


class _Unrolling:
    """bodies: of each template, its calls in order; firsts: the call of ``repeated`` of its full trace."""

    def __init__(self, graph: fx.Graph, repeats: Repeats) -> None:
        self.old, self.repeats = graph, repeats
        self.new = fx.Graph()
        self.mapped: dict[fx.Node, Any] = {}
        self.bodies: dict[int, list[fx.Node]] = {}
        self.firsts: dict[int, fx.Node] = {}
        self.laid: dict[int, dict[fx.Node, fx.Node]] = {}

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.target is not repeated:
                self.mapped[node] = self.new.node_copy(node, self.mapped.__getitem__)
            elif _arguments(node).run == FIRST:
                self.mapped[node] = self.mapped[self._learn(node)]
            else:
                self.mapped[node] = self._repeat(node)
        return self.new

    def _learn(self, node: fx.Node) -> fx.Node:
        """Of the first run, what the node stands for."""
        values, number, _, place = _arguments(node)
        outside = len(self.repeats.templates[number].outside)
        if number not in self.bodies:
            self.firsts[number], self.bodies[number] = node, self._body(values[:outside], values[outside:])
        return values[outside + place]

    def _body(self, outside: list[fx.Node], made: list[fx.Node]) -> list[fx.Node]:
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
        return [node for node in self.old.nodes if node in found]

    def _repeat(self, node: fx.Node) -> fx.Node:
        values, number, run, place = _arguments(node)
        known = _arguments(self.firsts[number]).values
        if run not in self.laid:
            self.laid[run] = self._lay(number, dict(zip(known, values, strict=False)), node)
        return self.laid[run][known[len(values) + place]]

    def _lay(self, number: int, outside: Mapping[fx.Node, fx.Node], call: fx.Node) -> dict[fx.Node, fx.Node]:
        laid = {inner: self.mapped[actual] for inner, actual in outside.items()}
        shift = self.repeats.shifts[_arguments(call).run]
        for node in self.bodies[number]:
            args, kwargs = fx.map_arg(node.args, laid.__getitem__), fx.map_arg(node.kwargs, laid.__getitem__)
            made = self.new.create_node("call_function", node.target, args, kwargs, name=_shifted(node.name, shift))
            made.meta = {**node.meta, "nn_module_stack": _moved(node, self.firsts[number], call)}
            laid[node] = made
        return laid


def _shifted(name: str, shift: Counter[str]) -> str:
    match = _NUMBERED.fullmatch(name)
    assert match is not None
    base, number = match.groups()
    return f"{base}_{int(number or 0) + shift[base]}"


def _moved(node: fx.Node, first: fx.Node, call: fx.Node) -> dict[str, Any]:
    """The modules a repeated node lies in: those of its module, then those within, under that one's name."""
    before, after = first.meta["nn_module_stack"], call.meta["nn_module_stack"]
    old, new = (list(stack.values())[-1][0] for stack in (before, after))
    inner = {key: entry for key, entry in node.meta["nn_module_stack"].items() if key not in before}
    moved = {key.replace(old, new, 1): (path.replace(old, new, 1), kind) for key, (path, kind) in inner.items()}
    return {**after, **moved}
