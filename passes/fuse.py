"""Fuse: a product that is a parameter's gradient is written straight into the parameter's buffer.

The gradient itself then never exists: neither its bytes nor the pass that would copy or add it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from passes import vocabulary
from passes.fakes import fake_tensor
from passes.graph import torch_dtype
from passes.storage import is_view, own_storage

aten = torch.ops.aten
ACCUMULATIONS = (vocabulary.accumulate, vocabulary.accumulate_product)


def fuse(backward: fx.Graph, dtypes: Mapping[str, str]) -> None:
    """``accumulate`` of a product, or of its transpose, becomes ``accumulate_product`` where the product stood.

    dtypes: of the buffers, by parameter, where a product may be written; it has its operands' dtype and fits no other.
    """
    for node in [n for n in backward.nodes if n.target is vocabulary.accumulate]:
        chain = _from_product(node)
        dtype = dtypes.get(parameter_of(node))
        if chain and dtype is not None and chain[0].meta["val"].dtype == torch_dtype(dtype):
            _replace(backward, node, chain)


def parameter_of(node: fx.Node) -> str:
    """The parameter whose buffer a node of ``ACCUMULATIONS`` adds to."""
    return str(node.args[-1])


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two matrices of an ``accumulate_product`` or ``put_product``."""
    left, right = [each for each in node.args if isinstance(each, fx.Node)][-2:]
    return left, right


def product(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What an ``accumulate_product`` or ``put_product`` writes, as a value of its own, made before the node."""
    left, right = operands(node)
    with graph.inserting_before(node):
        made = graph.call_function(aten.mm.default, (left, right))
    rows, columns = left.meta["val"].shape[0], right.meta["val"].shape[1]
    value = fake_tensor((rows, columns), left.meta["val"].dtype)
    made.meta = {**node.meta, "val": value, "storage": own_storage(made)}
    return made


def _from_product(accumulation: fx.Node) -> list[fx.Node]:
    """The product and the transpositions between it and where it is accumulated; empty where it has other uses."""
    chain: list[fx.Node] = []
    node: object = accumulation.args[0]
    user: fx.Node = accumulation
    while isinstance(node, fx.Node) and node.op == "call_function" and set(node.users) == {user}:
        chain.insert(0, node)
        if node.target is aten.mm.default:
            return chain
        if not _flips(node):
            return []
        user, node = node, node.args[0]
    return []


def _flips(node: fx.Node) -> bool:
    """Whether a call is a view that exchanges the two dims of a matrix."""
    source = node.args[0] if node.args else None
    if not is_view(node) or not isinstance(source, fx.Node) or len(node.all_input_nodes) != 1:
        return False
    made, given = node.meta["val"], source.meta["val"]
    if made.dim() != 2 or given.dim() != 2 or made.storage_offset() != given.storage_offset():
        return False
    return bool(made.shape == given.shape[::-1] and made.stride() == given.stride()[::-1])


def _replace(graph: fx.Graph, accumulation: fx.Node, chain: list[fx.Node]) -> None:
    first = chain[0]
    left, right = first.args
    with graph.inserting_before(first):
        if len(chain) % 2 == 0:
            left, right = _flipped(graph, right), _flipped(graph, left)
        made = graph.call_function(vocabulary.accumulate_product, (left, right, parameter_of(accumulation)))
    made.meta = {key: first.meta[key] for key in ("segment", "label", "nn_module_stack") if key in first.meta}
    for node in (accumulation, *reversed(chain)):
        graph.erase_node(node)


def _flipped(graph: fx.Graph, node: object) -> fx.Node:
    """The transpose of an operand; of one that is a transpose itself, what it is the transpose of."""
    assert isinstance(node, fx.Node)
    if node.op == "call_function" and _flips(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source
    made = graph.call_function(aten.t.default, (node,))
    made.meta = {**node.meta, "val": node.meta["val"].t()}
    return made
