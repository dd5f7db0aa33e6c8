"""Settled: the values of tensors into which neither batch nor parameters enter, while a model is traced.

``if mask.all()`` has one answer wherever the mask is made of sizes and numbers, though a trace has no values: the calls
that made it, and those that wrote to what they read, are in the graph so far and are run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from passes.calls import schema_arguments
from passes.graph import is_getitem
from passes.storage import memory_of

_READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def settled_reads() -> Iterator[None]:
    """While a model is traced: Python reads numbers from tensors that have values."""

    def reading(plain: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def read(tensor: Tensor) -> Any:
            value = settled(tensor)
            if value is None:
                return plain(tensor)
            with torch._C.DisableTorchFunction():
                return plain(value)

        return read

    with ExitStack() as patched:
        for name in _READS:
            patched.enter_context(mock.patch.object(Tensor, name, reading(getattr(Tensor, name))))
        yield


def settled(tensor: Tensor) -> Tensor | None:
    """The value of a traced tensor; None where it depends on anything but numbers."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(tensor, FakeTensor):
        return None
    node: fx.Node | None = get_proxy_slot(tensor, mode.tracer, None, lambda held: held.proxy.node)
    calls = None if node is None else _calls(node)
    if node is None or calls is None:
        return None
    assert isinstance(mode.tracer, PythonKeyTracer)
    values: dict[fx.Node, Any] = {}
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        for call in calls:
            values[call] = _run(call, values, mode.tracer.root)
    value = values[node]
    assert isinstance(value, Tensor) and value.shape == tensor.shape
    return value


def _run(call: fx.Node, values: dict[fx.Node, Any], root: Any) -> Any:
    if call.op == "get_attr":
        return getattr(root, str(call.target))
    args, kwargs = fx.map_arg((call.args, call.kwargs), values.__getitem__)
    assert callable(call.target)
    return call.target(*args, **kwargs)


def _calls(node: fx.Node) -> list[fx.Node] | None:
    """What makes it and writes to what that reads, in order; None where not all are calls of ATen on numbers."""
    writers = [(writer, written) for writer in node.graph.nodes if (written := _written(writer))]
    found, queue = dict[fx.Node, None](), [node]
    while queue:
        call = queue.pop()
        if call in found:
            continue
        if not _is_settled(call):
            return None
        found[call] = None
        queue += call.all_input_nodes
        memory = _memory(call)
        queue += [writer for writer, written in writers if writer not in found and memory & written]
    return [each for each in node.graph.nodes if each in found]


def _is_settled(call: fx.Node) -> bool:
    if call.op == "get_attr":
        return "_tensor_constant" in str(call.target)
    if not isinstance(call.target, OpOverload):
        return is_getitem(call)
    return call.target.namespace == "aten" and torch.Tag.nondeterministic_seeded not in call.target.tags


def _memory(call: fx.Node) -> set[int]:
    return {memory_of(leaf) for leaf in pytree.tree_leaves(call.meta.get("val")) if isinstance(leaf, Tensor)}


def _written(call: fx.Node) -> set[int]:
    """The memory that a call writes to."""
    if not isinstance(call.target, OpOverload) or not call.target._schema.is_mutable:
        return set()
    given = schema_arguments(call)
    names = [a.name for a in call.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    operands = [leaf for leaf in pytree.tree_leaves([given.get(name) for name in names]) if isinstance(leaf, fx.Node)]
    return set[int]().union(*map(_memory, operands))
