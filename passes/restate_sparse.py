"""Restate sparse matrices: their places and values, and of a product what these pick, weigh and add up.

A sparse buffer or constant enters a graph as two constants; one that forward makes of places and values is these. Only
matrices of numbers are restated, in products, transposes, scalings and where they are made dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from cost_model.errors import UnsupportedError
from cost_model.tensor import TensorMeta
from passes.flat import flat
from passes.graph import GraphInput, source_of

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten


@dataclass(frozen=True)
class Sparse:
    """indices: [2, n], rows and columns, a place as often as it is added to; values: [n]; flipped: of the transpose."""

    indices: fx.Node
    values: fx.Node
    size: tuple[int, int]
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.size[::-1] if self.flipped else self.size


Call = Callable[["Cleaner", fx.Node, list[Any]], Any]
_CALLS: dict[Any, Call] = {}


def is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is not torch.strided


def spell_out(node: fx.Node, entry: GraphInput, held: Tensor) -> dict[str, tuple[GraphInput, Tensor]]:
    """An input that holds a sparse matrix as two constants, by their nodes' names; UnsupportedError for other tensors.

    Calls that took it take the matrix that is made of them.
    """
    if held.is_meta or held.dim() != 2 or entry.trainable or held.layout not in (torch.sparse_coo, torch.sparse_csr):
        raise UnsupportedError(
            f"{entry.target!r} is a sparse tensor that no rule divides; autopar takes sparse matrices of constants in "
            "COO or CSR form: make it dense, or keep places and values as tensors"
        )
    whole = held.detach().cpu().to_sparse(layout=torch.sparse_coo).coalesce()
    graph, parts = node.graph, (("indices", whole.indices()), ("values", whole.values()))
    given: list[fx.Node] = []
    found: dict[str, tuple[GraphInput, Tensor]] = {}
    assert whole.values().dim() == 1, "a matrix of numbers"
    for name, tensor in parts:
        with graph.inserting_after(given[-1] if given else node):
            made = graph.placeholder(f"{node.name}_{name}")
        made.meta["val"] = _fake(node, tensor)
        given.append(made)
        found[made.name] = (GraphInput(made.name, "constant", f"{entry.target}.{name}", False, False), tensor)
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
    with graph.inserting_after(last):
        matrix = graph.call_function(aten.sparse_coo_tensor.indices_size, (*given, list(held.shape)))
    matrix.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(matrix)
    return found


def _fake(node: fx.Node, tensor: Tensor) -> Tensor:
    with node.meta["val"].fake_mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def touches_sparse(run: Cleaner, node: fx.Node) -> bool:
    """Whether a call takes or makes tensors that are not laid out by strides."""
    if any(isinstance(run.mapped.get(operand), Sparse) for operand in node.all_input_nodes):
        return True
    given = [operand for operand in node.all_input_nodes if operand.op != "call_function"]  # calls were looked at
    return any(is_sparse(leaf) for one in (node, *given) for leaf in flat(one.meta.get("val"))[0])


def sparse_call(run: Cleaner, node: fx.Node) -> Any:
    """What a call is that takes or makes a sparse matrix. Errors: UnsupportedError."""
    call = _CALLS.get(node.target)
    made = NotImplemented if call is None or node.kwargs.keys() - _NAMELESS else call(run, node, _operands(run, node))
    if made is NotImplemented:
        raise UnsupportedError(
            f"{node.target} takes or makes a sparse tensor ({source_of(node)}), which no rule divides: make it dense "
            "(.to_dense()), or keep places and values as tensors and add up what they reach "
            "(x.new_zeros(n, d).index_add(0, rows, values[:, None] * x[columns]))"
        )
    return made


_NAMELESS = {"dtype", "layout", "device", "pin_memory", "is_coalesced", "check_invariants"}
"""Keywords of what the tensors given say already."""


def _operands(run: Cleaner, node: fx.Node) -> list[Any]:
    return [run.operand(argument) for argument in node.args]


def _calls(*targets: Any) -> Callable[[Call], Call]:
    def register(function: Call) -> Call:
        _CALLS.update(dict.fromkeys(targets, function))
        return function

    return register


@_calls(aten.sparse_coo_tensor.indices_size, aten._sparse_coo_tensor_unsafe.default)
def _made(run: Cleaner, node: fx.Node, a: list[Any]) -> Any:
    indices, values, size = a[:3]
    if len(run.tensor(values).shape) != 1 or len(size) != 2:
        return NotImplemented
    return Sparse(indices, values, (int(size[0]), int(size[1])))


@_calls(aten.coalesce.default, aten.alias.default, aten.contiguous.default)
def _same(run: Cleaner, node: fx.Node, a: list[Any]) -> Any:
    return a[0]


@_calls(aten.t.default, aten.transpose.int, aten.numpy_T.default, aten.mT.default)
def _flipped(run: Cleaner, node: fx.Node, a: list[Any]) -> Any:
    is_same = len(a) == 3 and (a[1] - a[2]) % 2 == 0
    return a[0] if is_same else replace(a[0], flipped=not a[0].flipped)


@_calls(
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.detach.default,
    aten.to.dtype, aten._to_copy.default,
)  # fmt: skip
def _of_values(run: Cleaner, node: fx.Node, a: list[Any]) -> Any:
    """Calls that change each number by itself, and leave zeros zero."""
    if any(isinstance(operand, fx.Node | Sparse) for operand in a[1:]) or not isinstance(a[0], Sparse):
        return NotImplemented
    meta = run.tensor(a[0].values)
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    if dtype != meta.dtype:
        return replace(a[0], values=run.cast(node, a[0].values, dtype)) if node.target in _CASTS else NotImplemented
    made = a[0].values if node.target in _CASTS else run.call(node.target, (a[0].values, *a[1:]), meta, like=node)
    return replace(a[0], values=made)


_CASTS = (aten.to.dtype, aten._to_copy.default)


@_calls(aten.matmul.default, aten.mm.default, aten._sparse_mm.default, aten.mv.default)
def _product(run: Cleaner, node: fx.Node, a: list[Any]) -> Any:
    left, right = a
    if isinstance(left, Sparse) and isinstance(right, Sparse):
        return NotImplemented
    if isinstance(left, Sparse):
        return _of_columns(run, node, left, right)
    if len(run.tensor(left).shape) != 2:
        return NotImplemented
    turned = _turned(run, node, left)
    return _turned(run, node, _of_columns(run, node, replace(right, flipped=not right.flipped), turned))


@_calls(aten._sparse_addmm.default)
def _added(run: Cleaner, node: fx.Node, a: list[Any]) -> Any:
    if not isinstance(a[1], Sparse) or isinstance(a[2], Sparse) or any(scale != 1 for scale in a[3:]):
        return NotImplemented
    made = _of_columns(run, node, a[1], a[2])
    return run.call(aten.add.Tensor, (made, a[0]), run.tensor(made), like=node)


def _turned(run: Cleaner, node: fx.Node, x: fx.Node) -> fx.Node:
    meta = run.tensor(x)
    return run.call(aten.permute.default, (x, [1, 0]), replace(meta, shape=meta.shape[::-1]), like=node)  # type: ignore[no-any-return]


def _of_columns(run: Cleaner, node: fx.Node, matrix: Sparse, x: fx.Node) -> Any:
    """matrix @ x, of x [m, d] or [m]: rows that columns pick, weighed and added up where rows say."""
    meta, values = run.tensor(x), run.tensor(matrix.values)
    rows, columns = (_places(run, node, matrix, row) for row in (0, 1))
    out, count = (matrix.shape[0], *meta.shape[1:]), values.shape[0]
    picked = TensorMeta((count, *meta.shape[1:]), meta.dtype)
    made = run.call(aten.index_select.default, (x, 0, columns), picked, like=node)
    weights = matrix.values
    if len(meta.shape) == 2:
        weights = run.call(aten.unsqueeze.default, (weights, 1), replace(values, shape=(count, 1)), like=node)
    made = run.call(aten.mul.Tensor, (made, weights), picked, like=node)
    return _added_up(run, node, rows, made, TensorMeta(out, meta.dtype))


def _added_up(run: Cleaner, node: fx.Node, rows: fx.Node, x: fx.Node, out: TensorMeta) -> Any:
    kind = {"dtype": getattr(torch, out.dtype), "device": torch.device("cpu")}
    zeros = run.call(aten.full.default, (list(out.shape), 0.0), out, like=node, **kind)
    return run.call(aten.index_add.default, (zeros, 0, rows, x), out, like=node)


def _places(run: Cleaner, node: fx.Node, matrix: Sparse, row: int) -> fx.Node:
    count = run.tensor(matrix.indices).shape[1]
    args = (matrix.indices, 0, row ^ int(matrix.flipped))
    return run.call(aten.select.int, args, TensorMeta((count,), "int64"), like=node)  # type: ignore[no-any-return]


@_calls(aten.to_dense.default)
def _dense(run: Cleaner, node: fx.Node, a: list[Any]) -> Any:
    """Numbers added up in one row of all places, cut into rows."""
    matrix, (height, width) = a[0], a[0].shape
    rows, columns = (_places(run, node, matrix, row) for row in (0, 1))
    places, dtype = run.tensor(rows), run.tensor(matrix.values).dtype
    rows = run.call(aten.mul.Tensor, (rows, width), places, like=node)
    flat = run.call(aten.add.Tensor, (rows, columns), places, like=node)
    made = _added_up(run, node, flat, matrix.values, TensorMeta((height * width,), dtype))
    return run.call(aten.reshape.default, (made, [height, width]), TensorMeta((height, width), dtype), like=node)
