"""Multiply: products of float32 matrices become calls of oneDNN, for devices that are faster with it.

Of what torch's CPU builds call for products, MKL uses no AVX-512 on processors that are not Intel's; oneDNN does. It
wants the rows of its first operand one behind the other, so one that lies transposed is copied first, by a call of its
own: that takes a tenth as long as the product, or a third where the result is narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from cost_model.device_rows import QUICK_FLOPS
from passes import vocabulary
from passes.fakes import fake_tensor
from passes.fuse import operands, product
from passes.storage import own_storage

aten = torch.ops.aten
_APART: dict[object, Callable[..., object]] = {
    vocabulary.accumulate_product: vocabulary.accumulate,
    vocabulary.put_product: vocabulary.put,
}
"""What writes a product that is made apart: oneDNN makes results in memory of their own."""


def multiply(graph: fx.Graph) -> None:
    """``mm``, and ``addmm`` of a bias for each column, become ``product`` where they are large enough."""
    for node in list(graph.nodes):
        if node.target in _APART and _gains(*operands(node)):
            _separate(graph, node)
    for node in graph.nodes:
        found = _operands(node)
        if found is not None and _gains(*found[:2]):
            left, right, bias = found
            node.target, node.args = vocabulary.product, (_by_rows(graph, node, left), right, bias)


def _separate(graph: fx.Graph, node: fx.Node) -> None:
    """The product that a call writes stands before it."""
    made, (left, right) = product(graph, node), operands(node)
    *bucket, place = (each for each in node.args if each is not left and each is not right)
    node.args = (*bucket, made, place)
    node.target = _APART[node.target]


def _by_rows(graph: fx.Graph, node: fx.Node, matrix: fx.Node) -> fx.Node:
    """A matrix, or its copy before ``node`` where that lies otherwise."""
    value = matrix.meta["val"]
    if value.is_contiguous():
        return matrix
    with graph.inserting_before(node):
        copied = graph.call_function(vocabulary.by_rows, (matrix,))
    laid = fake_tensor(value.shape, value.dtype)
    copied.meta = {**node.meta, "val": laid, "storage": own_storage(copied)}
    return copied


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(left, right, bias) of a product that oneDNN knows."""
    if node.kwargs or node.target not in (aten.mm.default, aten.addmm.default):
        return None
    bias, left, right = (None, *node.args)[-3:]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if bias is None:
        return left, right, None
    assert isinstance(bias, fx.Node)
    return (left, right, bias) if bias.meta["val"].shape == right.meta["val"].shape[1:] else None


def _gains(left: fx.Node, right: fx.Node) -> bool:
    first, second = left.meta["val"], right.meta["val"]
    flops = 2 * math.prod(first.shape) * second.shape[1]
    return first.dtype == torch.float32 and _is_plain(second) and flops >= QUICK_FLOPS


def _is_plain(matrix: Tensor) -> bool:
    """Whether its rows, or its columns, lie one behind the other."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()
