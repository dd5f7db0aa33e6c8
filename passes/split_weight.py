"""Split a backward in two: what the stage before waits for, and the gradients of parameters, which nobody waits for.

The first part makes the gradient of the activation received; the second makes the rest, from values that the first
keeps for it, and adds gradients to their buffers. Views are made again rather than kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import fx

from passes.graph import is_getitem
from passes.split import SplitGraphs, copied, inputs_first, placeholder, reaching
from passes.storage import is_view


def split_weight(graphs: SplitGraphs, owned: Collection[str]) -> SplitGraphs:
    """The graphs with ``backward`` cut in two. owned: what a microbatch is handed, and drops after its last use.

    ``kept``: of what is owned or made by ``backward``, what ``weight`` reads.
    """
    output = next(n for n in graphs.backward.nodes if n.op == "output")
    calls = [n for n in graphs.backward.nodes if n.op == "call_function"]
    results: list[fx.Node] = list(output.args[0])
    first = reaching(results, set(calls))
    first |= {n for n in calls if is_getitem(n) and n.args[0] in first}
    weight, brought = _weight(calls, first)
    kept = [n for n in brought if n in first or n.name in owned]
    backward = _backward(calls, first, kept, results)
    return replace(graphs, backward=backward, weight=weight, kept=tuple(n.name for n in kept))


def _weight(calls: list[fx.Node], first: Collection[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """The calls that are not in ``first``, and what they read of the rest, in order."""
    graph: fx.Graph = fx.Graph()
    mapped: dict[fx.Node, Any] = {}
    brought: list[fx.Node] = []

    def bring(node: fx.Node) -> None:
        if node in mapped:
            return
        if node.op == "call_function" and is_view(node):
            for operand in node.all_input_nodes:
                bring(operand)
            mapped[node] = copied(graph, node, mapped)
            return
        mapped[node] = placeholder(graph, node)
        brought.append(node)

    for node in calls:
        if node not in first:
            for operand in node.all_input_nodes:
                bring(operand)
            mapped[node] = copied(graph, node, mapped)
    graph.output(())
    return inputs_first(graph), brought


def _backward(
    calls: list[fx.Node], first: Collection[fx.Node], kept: list[fx.Node], results: list[fx.Node]
) -> fx.Graph:
    graph: fx.Graph = fx.Graph()
    mapped: dict[fx.Node, Any] = {}
    for node in calls:
        if node in first:
            for operand in node.all_input_nodes:
                if operand not in mapped:
                    mapped[operand] = placeholder(graph, operand)
            mapped[node] = copied(graph, node, mapped)
    for node in (*results, *kept):
        if node not in mapped:
            mapped[node] = placeholder(graph, node)
    graph.output(tuple(mapped[node] for node in results))
    return inputs_first(graph)
