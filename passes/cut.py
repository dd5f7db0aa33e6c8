"""Cut: one stage's part of the forward graph, with its own copy of every ambient value it uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.batch import BatchAnalysis
from passes.dependence import ancestors
from passes.graph import GraphInput, ModelGraph, drop_dead_calls
from passes.pieces import AMBIENT
from passes.rewriter import GraphBuilder
from passes.segment import Segment, carried_values

SHARE = "share_of_"
"""Names of calls that scale a term that knows no batch begin so, as none of a model's later do."""
_KIND_ORDER = {"parameter": 0, "buffer": 1, "constant": 2, "batch": 3, "step": 4, "scale": 5, "activation": 6}


def cut_stage(
    model: ModelGraph,
    segments: tuple[Segment, ...],
    first: int,
    last: int,
    analysis: BatchAnalysis,
    global_batch: int,
    replicas: int = 1,
) -> ModelGraph:
    """Segments [first, last) as a graph of their own.

    Its inputs are what those segments use: parameters, batch inputs, step constants and, unless it is the first
    stage, the activation of the stage before and what is carried beside it; its outputs are the activation sent and
    what is carried on, or the loss. Nodes of carried values have ``meta["carried"]``.
    replicas: over which statistics of the batch are synchronised.
    """
    chosen = {name for s in segments[first:last] for name in s.nodes}
    numbers = {name: first + i for i, s in enumerate(segments[first:last]) for name in s.nodes}
    by_name = {n.name: n for n in model.graph.nodes}
    entry = segments[first].entry
    received = (*([entry] if entry else []), *segments[first].carried)
    inputs = _stage_inputs(model, by_name, chosen, received, analysis)
    carried = carried_values(segments)
    built = GraphBuilder()
    mapped: dict[fx.Node, Any] = {by_name[i.node]: built.placeholder(i.node, model.metas[i.node]) for i in inputs}
    after = segments[last].carried if last < len(segments) else ()
    exits = [by_name[name] for name in (segments[last - 1].exit, *after)]
    for node in ancestors(exits) if chosen else []:
        if node in mapped or node.op != "call_function" or not _needed(node, chosen, mapped):
            continue
        copied = built.copy(node, mapped, model.metas[node.name])
        copied.meta["segment"] = numbers.get(node.name, AMBIENT)
        copied.meta["carried"] = node.name in carried
        if node.name in analysis.synchronised:
            copied.args = (*copied.args[:-1], replicas)
        _scale_shared(built, node, copied, mapped, analysis, model.batch / global_batch)
        mapped[node] = copied
    outputs = tuple(mapped[node] for node in exits)
    built.graph.output(outputs)
    drop_dead_calls(built.graph)
    return ModelGraph(built.graph, built.metas, inputs, tuple(n.name for n in outputs), model.batch)


def _needed(node: fx.Node, chosen: set[str], mapped: dict[fx.Node, Any]) -> bool:
    """A call of the stage, or an ambient one whose operands are all at hand."""
    return node.name in chosen or all(o in mapped for o in node.all_input_nodes)


def _stage_inputs(
    model: ModelGraph,
    by_name: dict[str, fx.Node],
    chosen: set[str],
    received: tuple[str, ...],
    analysis: BatchAnalysis,
) -> tuple[GraphInput, ...]:
    """Walk back from the stage's calls, stopping at the activations received and at step constants."""
    stops = {*analysis.hoisted, *received}
    known = {i.node: i for i in model.inputs}
    found: dict[str, GraphInput] = {}
    seen: set[fx.Node] = set()
    stack = [by_name[name] for name in (*chosen, *received)]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in stops:
            kind = "activation" if node.name in received else "step"
            found[node.name] = GraphInput(node.name, kind, node.name, False, node.name in analysis.sliced)
        elif node.op == "placeholder":
            found[node.name] = known[node.name]
        else:
            stack.extend(node.all_input_nodes)
    order = {n.name: i for i, n in enumerate(model.graph.nodes)} | {name: i for i, name in enumerate(received)}
    return tuple(sorted(found.values(), key=lambda i: (_KIND_ORDER[i.kind], order[i.node])))


def _scale_shared(
    built: GraphBuilder,
    node: fx.Node,
    copied: fx.Node,
    mapped: dict[fx.Node, Any],
    analysis: BatchAnalysis,
    fraction: float,
) -> None:
    """A term that knows no batch enters each part's sum with that part's share."""
    for operand in node.all_input_nodes:
        if fraction != 1 and (node.name, operand.name) in analysis.shared:
            source = mapped[operand]
            with built.graph.inserting_before(copied):
                name = f"{SHARE}{operand.name}_in_{node.name}"
                times, meta = torch.ops.aten.mul.Tensor, built.metas[source.name]
                scaled = built.call(times, (source, fraction), meta, like=node, name=name)
            scaled.meta["segment"] = copied.meta["segment"]
            copied.replace_input_with(source, scaled)


def prologue(model: ModelGraph, names: tuple[str, ...]) -> ModelGraph | None:
    """The named step constants as a graph over the global batch; None where there are none."""
    if not names:
        return None
    by_name = {n.name: n for n in model.graph.nodes}
    needed = ancestors([by_name[name] for name in names])
    known = {i.node: i for i in model.inputs}
    built = GraphBuilder()
    mapped: dict[fx.Node, Any] = {}
    inputs = []
    for node in needed:
        if node.op == "placeholder":
            mapped[node] = built.placeholder(node.name, model.metas[node.name])
            inputs.append(known[node.name])
        else:
            mapped[node] = built.copy(node, mapped, model.metas[node.name])
    built.graph.output(tuple(mapped[by_name[name]] for name in names))
    return ModelGraph(built.graph, built.metas, tuple(inputs), names, model.batch)
