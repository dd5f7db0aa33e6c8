"""Unmutate: calls of a recorded graph that write into an operand become calls that return what they wrote.

Kernels made of others (``lstm_cell``) write into values of their own, which a recorder shows. Passes that keep, move or
repeat calls (recompute) take every value for what it was when it was made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from cost_model.errors import VerificationError
from passes.graph import is_getitem
from passes.storage import is_view, mark_storages

_APART = (
    torch.ops.aten.unsafe_chunk.default,
    torch.ops.aten.unsafe_split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default,
)
"""Ops whose results lie in one storage, but in parts of it that are never used as one again."""


_PARTS: dict[Any, Any] = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
    torch.ops.aten.diagonal.default: torch.ops.aten.diagonal_scatter.default,
}
"""Views of a part, and what lays a part into a copy of the whole."""


def unmutate(graph: fx.Graph) -> None:
    """Change a graph in place; its storages are marked. Errors: VerificationError for an alias that is read later."""
    mark_storages(graph)
    written = [(node, _plain(node.target)) for node in graph.nodes]
    changed = [(node, plain) for node, plain in written if plain is not None]
    stale = False  # storages of what is not written to any more
    for node, plain in changed:
        if stale and node.args[0].target in _PARTS:
            _propagate(graph)
        if not write_part(graph, node):
            _check_last_use(graph, node)
        node.target, stale = plain, True
    if changed:
        _propagate(graph)


def _plain(target: Any) -> Any:
    """The op that returns what an op writes into its first operand: aten.add.Tensor for aten.add_.Tensor."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not target._schema.is_mutable:
        return None
    name, overload = target.overloadpacket.__name__, target._overloadname
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    plain = _of_same_arguments(packet, target) or getattr(packet, overload, None)
    if plain is None or not name.endswith("_"):
        raise VerificationError("mutation", f"{target} writes into a value in a way that has no plain form")
    return plain


def _of_same_arguments(packet: Any, target: torch._ops.OpOverload) -> Any:
    """aten.transpose.int for aten.transpose_.default, and aten.pow.Tensor_Scalar for aten.pow_.Scalar."""
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    overloads = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    return next((o for o in overloads if [(a.name, str(a.type)) for a in o._schema.arguments] == wanted), None)


def write_part(graph: fx.Graph, node: fx.Node) -> bool:
    """A write into a part of a value: who reads either later reads the part, or a value with it laid into.

    A part of a part is laid into that, and that into the whole. Returns whether it is such a write, to which nothing
    else stands in the way, as another write by the same view of the part, of which the whole would not know; what is
    laid has no meta yet.
    """
    parts: list[Any] = [node.args[0]]
    while isinstance(parts[-1], fx.Node) and parts[-1].target in _PARTS:
        parts.append(parts[-1].args[0])
    whole = parts.pop()
    if not parts or not isinstance(whole, fx.Node) or is_view(whole):
        return False
    nodes = list(graph.nodes)
    later = set(nodes[nodes.index(node) + 1 :])
    family = {n for n in nodes if _root(n) is whole}
    others = family - {whole, *parts, node} - later
    if any(reader in later for other in others for reader in other.users):
        return False
    readers = {user for value in (node, *parts) for user in value.users} & later
    if any(_is_alias(user, (node, *parts)) for user in readers):
        return False
    again = next((n for n in nodes[nodes.index(node) + 1 :] if _writes_into(n, family)), None)
    if again is not None and any(user > again for user in readers):
        return False
    made = node
    for part in parts:
        assert isinstance(part, fx.Node)
        source = part.args[0]
        with graph.inserting_after(made):
            laid = graph.call_function(_PARTS[part.target], (source, made, *part.args[1:]), dict(part.kwargs))
        part.replace_all_uses_with(made, delete_user_cb=lambda user: user in later)
        made = laid
    whole.replace_all_uses_with(made, delete_user_cb=lambda user: user in later)
    return True


def _is_alias(user: fx.Node, values: tuple[Any, ...]) -> bool:
    """Whether a call views one of some values, or writes to it."""
    return is_view(user) and user.args[0] in values


def _writes_into(node: fx.Node, family: set[fx.Node]) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and node.args[0] in family


def _check_last_use(graph: fx.Graph, node: fx.Node) -> None:
    """Whoever reads what was overwritten must do so through the call that wrote it."""
    root, nodes = _root(node.args[0]), list(graph.nodes)
    at = nodes.index(node)
    older = {other for other in nodes[:at] if _root(other) is root}
    late = next((user for user in nodes[at + 1 :] if older & set(user.all_input_nodes)), None)
    if late is not None:
        raise VerificationError("mutation", f"{late.target} reads an alias of what {node.target} wrote before")


def _root(node: Any) -> Any:
    """The value whose memory a node is a view of."""
    while isinstance(node, fx.Node) and is_view(node):
        source = node.args[0]
        if is_getitem(node) and isinstance(source, fx.Node) and source.target in _APART:
            return node
        node = source
    return node


def _propagate(graph: fx.Graph) -> None:
    """New fake values and storages, shared as the changed calls share memory."""
    values = [leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    mode = next(leaf.fake_mode for leaf in values if isinstance(leaf, torch._subclasses.FakeTensor))
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
                node.meta["val"] = node.target(*args, **kwargs)
    mark_storages(graph)
