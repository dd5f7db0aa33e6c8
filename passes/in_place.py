"""In place: calls of an exported graph that write into a value which nothing else reads become calls that return it.

``x += y`` and ``relu_`` of fresh values are most of what models write to; to state them so takes no second trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from passes.graph import is_getitem
from passes.storage import mark_storages, memory_of
from passes.unmutate import write_part


def writes(node: fx.Node) -> bool:
    """Whether a call changes one of its operands."""
    is_op = isinstance(node.target, torch._ops.OpOverload)
    return is_op and node.target._schema.is_mutable and "detach_" not in str(node.target)  # type: ignore[union-attr]


def state_writes(graph: fx.Graph) -> None:
    """Change those calls of a graph whose value, and all that shares its memory, is read through them alone from then
    on, and that keep its type and layout; and those that write into a part of a fresh value."""
    found = [node for node in graph.nodes if writes(node)]
    if not found:
        return
    _list_users(graph)
    known = _Memory(graph)
    for node in found:
        plain, written = _plain(node.target), node.args[0] if node.args else None
        if plain is None or not isinstance(written, fx.Node) or known.root(written).op != "call_function":
            continue
        value, made = written.meta["val"], value_of(node, plain)
        if (made.dtype, made.shape) != (value.dtype, value.shape):
            continue
        if made.stride() == value.stride() and known.is_read_through(node, written):
            node.target = plain
        elif write_part(graph, node):
            node.target = plain
            _describe(graph, _storages(written))
            known = _Memory(graph)
    for node in found:
        if not writes(node):
            _name_anew(graph, node)


def _list_users(graph: fx.Graph) -> None:
    """All users of each value: where an exporter makes regions, values forget calls that nothing reads."""
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            operand.users.setdefault(node)


def _name_anew(graph: fx.Graph, node: fx.Node) -> None:
    """A call by what it calls now."""
    with graph.inserting_before(node):
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        made = graph.create_node(node.op, node.target, node.args, node.kwargs, name)
    made.meta = node.meta
    node.replace_all_uses_with(made)
    graph.erase_node(node)


class _Memory:
    """Which nodes of a graph lie in the memory of which; that is marked, too."""

    def __init__(self, graph: fx.Graph) -> None:
        mark_storages(graph)
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self._roots: dict[fx.Node, fx.Node] = {}
        self._families: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            own = _storages(node)
            source = next((o for o in node.all_input_nodes if own & _storages(o)), None)
            self._roots[node] = node if source is None else self._roots[source]
            self._families.setdefault(self._roots[node], []).append(node)

    def root(self, node: fx.Node) -> fx.Node:
        """The node that made the memory."""
        return self._roots[node]

    def is_read_through(self, call: fx.Node, written: fx.Node) -> bool:
        """Whether nothing reads what lies in some memory after a call but through this."""
        memory = _storages(written)
        family = [other for other in self._families[self.root(written)] if not memory.isdisjoint(_storages(other))]
        earlier = [other for other in family if self.order[other] < self.order[call]]
        later = {user for other in earlier for user in other.users if self.order[user] > self.order[call]}
        return all(is_getitem(user) and memory.isdisjoint(_storages(user)) for user in later)


def _plain(target: Any) -> Any:
    """aten.add.Tensor for aten.add_.Tensor; None for what has no such form, or draws."""
    name, overload = target.overloadpacket.__name__, target._overloadname
    if target.namespace != "aten" or not name.endswith("_") or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    plain = getattr(getattr(torch.ops.aten, name[:-1], None), overload, None)
    if plain is None or plain._schema.is_mutable:
        return None
    names = [[(a.name, str(a.type)) for a in op._schema.arguments] for op in (plain, target)]
    return plain if names[0] == names[1] else None


def _storages(node: fx.Node) -> set[int]:
    """Of a node's values."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {memory_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}


def value_of(node: fx.Node, target: Any = None) -> Any:
    """What a call, or another target, makes of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
    leaves = pytree.tree_leaves((args, kwargs))
    with next(leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), torch.no_grad():
        called: Any = target or node.target
        return called(*args, **kwargs)


def called_before(place: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call in front of a node, of the same line and module."""
    with place.graph.inserting_before(place):
        made: fx.Node = place.graph.call_function(target, args, kwargs)
    made.meta = {**place.meta, "val": value_of(made)}
    return made


def _value(node: fx.Node) -> Any:
    """Of a call; or the module that a region runs."""
    return getattr(node.graph.owning_module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")


def _describe(graph: fx.Graph, memory: set[int]) -> None:
    """Values of calls that have none yet, and of views of these that lay in a memory before."""
    made: set[fx.Node] = set()
    for node in graph.nodes:
        moved = not made.isdisjoint(node.all_input_nodes) and not memory.isdisjoint(_storages(node))
        if node.op == "call_function" and (moved or "val" not in node.meta):
            node.meta["val"] = value_of(node)
            made.add(node)
