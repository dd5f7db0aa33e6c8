"""Overlap: collectives in two halves, so that they move behind what does not need them.

Parameters of a segment are gathered a segment ahead, forward and backward: their gather begins where those of the
segment before are there. What a segment's gradients are summed to is waited for where those of the next leave. An
all_reduce begins where it stood and is waited for before its first use, and what only leads to gradients of parameters
moves behind it. The same instructions on the same values, in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from passes import vocabulary
from passes.fakes import fake_tensor
from passes.fuse import ACCUMULATIONS
from passes.overlap_vocabulary import begin_all_gather, begin_all_reduce, begin_reduce_scatter, sum_arrived, wait
from passes.pieces import segment_of
from passes.split import SplitGraphs
from passes.storage import is_view

aten = torch.ops.aten


def overlap(graphs: SplitGraphs, state_axis: str) -> SplitGraphs:
    """state_axis: over which parameters and gradients are split."""
    handed = {*graphs.saved, *graphs.kept, graphs.output}
    for graph in (graphs.forward, *graphs.backwards):
        results = {place: n.name for place, n in enumerate(_results(graph)) if n.name in handed}
        _defer_products(graph)
        _gather_ahead(graph, state_axis)
        _scatter_late(graph, state_axis)
        for place, name in results.items():
            _results(graph)[place].name = name  # the other graphs know it by that
        graph.lint()
    return graphs


def _results(graph: fx.Graph) -> list[fx.Node]:
    return graph.output_node().all_input_nodes


# --- Parameters


def _gather_ahead(graph: fx.Graph, axis: str) -> None:
    """Gathers of a segment begin where the first of the segment before is waited for, the first ones at once."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    at = calls[0] if calls else None
    for gathers in _by_segment(n for n in calls if n.target is vocabulary.all_gather and _is_state(n, axis)):
        assert at is not None
        waits = []
        for node in gathers:
            with graph.inserting_before(at):
                begun = graph.call_function(begin_all_gather, node.args)
            begun.meta = dict(node.meta)
            waits.append(_waited(graph, node, begun))
        at = waits[0].next


def _is_state(node: fx.Node, axis: str) -> bool:
    """Whether a gather is one of parameters: of a row that is an input, over the axis on which these are split."""
    return node.args[1] == axis and node.all_input_nodes[0].op == "placeholder"


def _by_segment(nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    return (list(run) for _, run in itertools.groupby(nodes, key=segment_of))


def _waited(graph: fx.Graph, node: fx.Node, begun: fx.Node) -> fx.Node:
    """A wait in the place of ``node``, in the same memory as what has begun."""
    with graph.inserting_before(node):
        made = graph.call_function(wait, (begun,))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


# --- Gradients


def _scatter_late(graph: fx.Graph, axis: str) -> None:
    """What a segment's gradients are summed to is waited for where those of the next segment begin to leave."""
    over = [n for n in graph.nodes if n.target is vocabulary.reduce_scatter and n.args[1] == axis]
    found = [node for node in over if _is_kept(node)]
    late: list[fx.Node] = []
    for scatters in _by_segment(found):
        begun = [_begun_scatter(graph, node) for node in scatters]
        for node in late:
            _move_before(begun[0], node)
        late = [_summed(graph, *pair) for pair in zip(scatters, begun, strict=True)]
    output = next(n for n in graph.nodes if n.op == "output")
    for node in late:
        _move_before(output, node)


def _is_kept(node: fx.Node) -> bool:
    """Whether a sum is one of gradients: nothing is done with it but that it is added to what the rank keeps."""
    return all(u.target in ACCUMULATIONS or (u.target is aten.to.dtype and _is_kept(u)) for u in node.users)


def _begun_scatter(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        begun = graph.call_function(begin_reduce_scatter, node.args)
    whole, size = node.all_input_nodes[0].meta["val"], node.args[2]
    assert isinstance(size, int)
    value = fake_tensor((whole.numel() // size * (size - 1),), whole.dtype)
    begun.meta = {**node.meta, "val": value}
    return begun


def _summed(graph: fx.Graph, node: fx.Node, begun: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        made = graph.call_function(sum_arrived, (node.args[0], begun, *node.args[1:]))
    part = begun.meta["val"][: node.meta["val"].numel()].view(node.meta["val"].shape)
    made.meta = {**node.meta, "val": part}
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def _move_before(at: fx.Node, node: fx.Node) -> None:
    """A node, and after it all that is made of it."""
    at.prepend(node)
    for user in node.users:
        if user.op != "output":
            _move_before(at, user)


# --- Products behind sums


def _defer_products(graph: fx.Graph) -> None:
    """An all_reduce begins once its operand is there: what stands before it in its segment and leads to gradients of
    parameters alone comes after it. It is waited for before its first use."""
    alone = _for_parameters(graph)
    for node in [n for n in graph.nodes if n.target is vocabulary.all_reduce]:
        late = [n for n in _unread_before(node) if n in alone]
        if not any(map(_works, (*late, *_until_used(node)))):
            continue
        for other in reversed(late):
            node.append(other)
        with graph.inserting_before(node):
            begun = graph.call_function(begin_all_reduce, node.args)
        begun.meta = dict(node.meta)
        made = _waited(graph, node, begun)
        for other in _until_used(made):
            made.prepend(other)


_SUMS = (begin_all_reduce, wait)


def _unread_before(node: fx.Node) -> list[fx.Node]:
    """Calls of the same segment between the last sum and ``node`` that it does not depend on."""
    found: list[fx.Node] = []
    read = set(node.all_input_nodes)
    at = node.prev
    while at.op == "call_function" and at.target not in _SUMS and segment_of(at) == segment_of(node):
        if at in read:
            read.update(at.all_input_nodes)
        else:
            found.insert(0, at)
        at = at.prev
    return found


def _until_used(node: fx.Node) -> list[fx.Node]:
    """What stands between a call and the first use of what it makes."""
    found: list[fx.Node] = []
    at = node.next
    while at.op != "output" and at not in node.users:
        found.append(at)
        at = at.next
    return found


def _for_parameters(graph: fx.Graph) -> set[fx.Node]:
    """Calls that lead to nothing but buffers of gradients, and to some."""
    alone: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        ends = node.target in ACCUMULATIONS
        if ends or (node.op == "call_function" and node.users and all(user in alone for user in node.users)):
            alone.add(node)
    return alone


def _works(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_view(node)
