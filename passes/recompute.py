"""Recompute: which forward values a backward keeps and which it makes again, by segment and level.

"none" keeps all that the backward reads. "selective" keeps the fewest bytes from which all it reads can be made
again without repeating a product with a weight or a fused attention: a minimum cut, as in PyTorch's
min_cut_rematerialization_partition. "full" keeps what enters the segment. No level repeats a collective or a random
op: their results are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.graph import is_getitem, op_name
from passes.pieces import AMBIENT, segment_of
from passes.storage import is_view

_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "einsum")


@dataclass(frozen=True)
class Flow:
    """Values of one segment's forward.

    operands: value -> the values it is made from, in execution order; what is not a key is at hand anyway.
    nbytes: what keeping a value takes, None where it cannot be kept by itself (views, results of several tensors);
    fixed: values that are kept where they are needed, never made again.
    """

    operands: Mapping[str, tuple[str, ...]]
    nbytes: Mapping[str, int | None]
    fixed: frozenset[str]

    def made_again(self, needed: Iterable[str], kept: Collection[str]) -> frozenset[str]:
        """All that must be made for ``needed`` from what is kept or fixed."""
        found: set[str] = set()
        stack = list(needed)
        while stack:
            name = stack.pop()
            if name in self.operands and name not in found and name not in kept and name not in self.fixed:
                found.add(name)
                stack.extend(self.operands[name])
        return frozenset(found)

    def least_kept(self, needed: Collection[str]) -> frozenset[str]:
        """The fewest bytes of values from which all needed ones can be made; of equal sets that which repeats least."""
        import networkx  # 0.2 s, and only plans that recompute need it

        graph = networkx.DiGraph()
        graph.add_nodes_from(("source", "sink"))
        for name in {*self.made_again(needed, ()), *self._fixed_sources(needed)}:
            keep = self.nbytes[name]
            graph.add_edge((name, 0), (name, 1), **({} if keep is None else {"capacity": keep}))
            if name in self.fixed:
                graph.add_edge("source", (name, 0))
            else:
                graph.add_edges_from(((o, 1), (name, 0)) for o in self.operands[name] if o in self.operands)
            if name in needed:
                graph.add_edge((name, 1), "sink")
        flow = networkx.algorithms.flow.preflow_push(graph, "source", "sink")
        after = _reaching_sink(flow)
        return frozenset(n[0] for n in flow if n != "sink" and n not in after and n[-1] == 0 and (n[0], 1) in after)

    def _fixed_sources(self, needed: Iterable[str]) -> set[str]:
        made = self.made_again(needed, ())
        return {o for name in made for o in self.operands[name] if o in self.fixed} | (set(needed) & self.fixed)


def _reaching_sink(flow: Any) -> set[object]:
    """Nodes from which the sink can still be reached in the residual network."""
    found: set[object] = {"sink"}
    stack: list[object] = ["sink"]
    while stack:
        node = stack.pop()
        for before in flow.pred[node]:
            edge = flow[before][node]
            if before not in found and edge["capacity"] > edge["flow"]:
                found.add(before)
                stack.append(before)
    return found


def repeated(
    flow: Flow, level: str, needed: Collection[str], heavy: Collection[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """(values kept, values made again) at a level; ``heavy``: products and attention, kept by "selective"."""
    if level == "none":
        return frozenset(needed), frozenset()
    if level == "selective":
        flow = Flow(flow.operands, flow.nbytes, flow.fixed | frozenset(heavy))
        kept = flow.least_kept(needed)
    else:
        kept = frozenset()
    again = flow.made_again(needed, kept)
    used = set(needed).union(*(flow.operands[name] for name in again))
    return frozenset(n for n in used if n in flow.operands and n not in again), again


def remade(
    forward: Sequence[fx.Node], needed: Collection[fx.Node], levels: Mapping[int, str], weights: Collection[fx.Node]
) -> frozenset[fx.Node]:
    """Calls of a stage's forward that its backward makes again, views left out.

    needed: forward values that the backward reads; levels: segment -> level ("none" where absent); weights: the
    placeholders of parameters. Values that depend on no parameter follow the segments if all of these recompute.
    """
    if all(level == "none" for level in levels.values()):
        return frozenset()
    if "none" not in levels.values():
        levels = {**levels, AMBIENT: "selective"}
    by_segment: dict[int, list[fx.Node]] = {}
    for node in forward:
        by_segment.setdefault(segment_of(node), []).append(node)
    found: set[fx.Node] = set()
    for segment, nodes in by_segment.items():
        by_name = {n.name: n for n in nodes}
        wanted = frozenset(n.name for n in needed if n.name in by_name)
        heavy = {n.name for n in nodes if _is_heavy_call(_source(n), weights)}
        _, again = repeated(flow_of(nodes), levels.get(segment, "none"), wanted, heavy)
        found |= {by_name[name] for name in again if not is_view(by_name[name])}
    return frozenset(found)


def flow_of(nodes: Sequence[fx.Node]) -> Flow:
    """The calls of one segment of a traced forward."""
    crossing = {_base(n) for n in nodes if any(segment_of(u) != segment_of(n) != AMBIENT for u in n.users)}
    return Flow(
        operands={n.name: tuple(o.name for o in n.all_input_nodes) for n in nodes},
        nbytes={n.name: _kept_bytes(n) for n in nodes},
        fixed=frozenset(n.name for n in nodes if (n in crossing or _is_once(_source(n))) and not is_view(n)),
    )


def _kept_bytes(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return None if is_view(node) or not isinstance(value, torch.Tensor) else int(value.untyped_storage().nbytes())


def _base(node: fx.Node) -> fx.Node:
    """The value whose storage a view shows."""
    while is_view(node):
        same = [o for o in node.all_input_nodes if o.op == "call_function"]
        if not same:
            return node
        node = same[0]
    return node


def _source(node: fx.Node) -> fx.Node:
    """The call that makes a value."""
    if is_getitem(node) and not is_view(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source
    return node


def _is_once(node: fx.Node) -> bool:
    """Collectives and random ops run once."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    namespace, name = _named(op_name(node))
    return random or (namespace == "autopar" and name in _COLLECTIVES)


def is_heavy(op: str, *, weighted: bool) -> bool:
    """A product with a weight, a convolution, or fused attention; products of two activations are not.

    op: "aten.mm.default"; weighted: whether an operand is a parameter or a view of one.
    """
    _, name = _named(op)
    return "attention" in name or "conv" in name or (weighted and name in _PRODUCTS)


def _is_heavy_call(node: fx.Node, weights: Collection[fx.Node]) -> bool:
    return is_heavy(op_name(node), weighted=any(_root(o) in weights for o in node.all_input_nodes))


def _root(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _named(op: str) -> tuple[str, str]:
    """("aten", "mm") of "aten.mm.default"."""
    namespace, _, rest = op.partition(".")
    return namespace, rest.partition(".")[0]
