"""Which values of a traced graph share memory: a storage identity on every node, set when it is traced.

Identities stand in ``node.meta["storage"]`` (a tuple for tuple outputs), so that copies of a traced piece can be given
storages of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from passes.graph import is_getitem


def mark_storages(graph: fx.Graph) -> None:
    """Set the identity of every node from its fake value."""
    for node in graph.nodes:
        node.meta["storage"] = _identities(node.meta.get("val"))


def _identities(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return memory_of(value)
    if isinstance(value, tuple | list):
        return tuple(_identities(v) for v in value)
    return None


def memory_of(value: torch.Tensor) -> int:
    """Equal for tensors that share memory; what torch.func wraps around a tensor has its memory."""
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return int(value.untyped_storage()._cdata)


def own_storage(node: fx.Node) -> Hashable:
    """The identity of what a call that a pass adds makes: functions of a stage share identities, and name their nodes
    alike."""
    return "made", node


def renamed(identity: Any, rename: Callable[[Hashable], Hashable]) -> Any:
    """The identity (or tuple of them) of a copied node."""
    if isinstance(identity, tuple) and not _is_renamed(identity):
        return tuple(renamed(part, rename) for part in identity)
    return None if identity is None else rename(identity)


def rebased(identity: Any, pairs: Iterable[tuple[fx.Node, fx.Node]]) -> Any:
    """The identity of a copied node, where (original, copy) of its operands lie elsewhere."""
    moved: dict[Hashable, Hashable] = {}
    for before, after in pairs:
        moved.update(zip(_flat(before.meta.get("storage")), _flat(after.meta.get("storage")), strict=False))
    return renamed(identity, lambda storage: moved.get(storage, storage))


def _flat(identity: Any) -> Iterator[Hashable]:
    if not isinstance(identity, tuple) or _is_renamed(identity):
        yield identity
    else:
        for part in identity:
            yield from _flat(part)


def _is_renamed(identity: tuple[Any, ...]) -> bool:
    return len(identity) == 2 and isinstance(identity[0], str)


def storage_of(node: fx.Node) -> Hashable:
    """Identity of the storage behind a tensor; None for tuples and non-tensors."""
    return node.meta.get("storage") if isinstance(node.meta.get("val"), torch.Tensor) else None


def is_view(node: fx.Node) -> bool:
    """Whether the value shares storage with an operand (a tuple: whether its first part does)."""
    if node.op != "call_function":
        return False
    if is_getitem(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return is_view(source)
    value, identity = node.meta.get("val"), node.meta.get("storage")
    if isinstance(value, tuple | list):
        identity = identity[0] if identity else None
    return identity is not None and any(storage_of(o) == identity for o in node.all_input_nodes)
