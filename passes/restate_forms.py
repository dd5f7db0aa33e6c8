"""Restate calls whose form hides what they do: samples of ``x.new_zeros(...)`` are no samples of x."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes.graph import meta_of, torch_dtype
from passes.restate import rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_PLAIN: dict[Any, Any] = {
    aten._conj.default: aten.conj_physical.default,
    aten.unsafe_split.Tensor: aten.split.Tensor,
    aten.unsafe_split_with_sizes.default: aten.split_with_sizes.default,
}
"""Ops that return what others do, in memory of another kind."""
_PARTS = {"complex64": "float32", "complex128": "float64"}
_EXTREMA = (aten.amin.default, aten.amax.default)


@rewrites(*_PLAIN)
def _plain(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    meta = meta_of(node.meta["val"])
    assert meta is not None
    return run.call(_PLAIN[node.target], tuple(a.values()), meta, like=node)


@rewrites(aten.aminmax.default)
def _both_extrema(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    metas, dims = meta_of(node.meta["val"]), [] if a["dim"] is None else [a["dim"]]
    assert isinstance(metas, tuple)
    meta = metas[0]
    assert meta is not None
    return [run.call(op, (a["self"], dims, a["keepdim"]), meta, like=node) for op in _EXTREMA]


@rewrites(aten.resolve_conj.default, aten.resolve_neg.default)
def _resolved(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return a["self"]


@rewrites(aten.view_as_complex.default)
def _joined_parts(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """A number of each pair: parameters in one buffer lie where a view of pairs need not be."""
    meta, source = meta_of(node.meta["val"]), run.tensor(a["self"])
    assert isinstance(meta, TensorMeta)
    part, last = TensorMeta(meta.shape, source.dtype), len(meta.shape)
    parts = [run.call(aten.select.int, (a["self"], last, place), part, like=node) for place in (0, 1)]
    return run.call(aten.complex.default, tuple(parts), meta, like=node)


@rewrites(aten.slice_scatter.default, aten.select_scatter.default)
def _laid_into(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Of complex numbers, which torch does not differentiate: what is before, what is laid, what is behind; or, of some
    places of a dim, both parts of each number."""
    meta = run.tensor(a["self"])
    if not meta.is_complex:
        return NotImplemented
    if a.get("step") != 1:
        return _laid_in_parts(run, node, a, meta)
    dim = a["dim"] % len(meta.shape)
    extent, pieces = meta.shape[dim], []
    start, stop, _ = slice(a["start"], a["end"]).indices(extent)
    assert stop - start == run.tensor(a["src"]).shape[dim]
    for first, last in ((0, start), (stop, extent)):
        shape = (*meta.shape[:dim], last - first, *meta.shape[dim + 1 :])
        piece = TensorMeta(shape, meta.dtype)
        kept = run.call(aten.slice.Tensor, (a["self"], dim, first, last), piece, like=node) if last > first else None
        pieces.append(kept)
    laid = [p for p in (pieces[0], a["src"], pieces[1]) if p is not None]
    return run.call(aten.cat.default, (laid, dim), meta, like=node)


def _laid_in_parts(run: Cleaner, node: fx.Node, a: dict[str, Any], meta: TensorMeta) -> Any:
    wide = TensorMeta((*meta.shape, 2), _PARTS[meta.dtype])
    laid = TensorMeta((*run.tensor(a["src"]).shape, 2), wide.dtype)
    whole = run.call(aten.view_as_real.default, (a["self"],), wide, like=node)
    source = run.call(aten.view_as_real.default, (a["src"],), laid, like=node)
    given = {**a, "self": whole, "src": source, "dim": a["dim"] % len(meta.shape)}
    made = run.call(node.target, tuple(given.values()), wide, like=node)
    return _joined_parts(run, node, {"self": made})


@rewrites(aten.cat.default)
def _joined(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Without the tensors of shape [0] that torch lets anybody join to anything (caches begin as such)."""
    rank, meta = max(len(run.tensor(t).shape) for t in a["tensors"]), meta_of(node.meta["val"])
    kept = [t for t in a["tensors"] if rank == 1 or run.tensor(t).shape != (0,)]
    if len(kept) == len(a["tensors"]) or meta is None:
        return NotImplemented
    return kept[0] if len(kept) == 1 else run.call(aten.cat.default, (kept, a["dim"]), meta, like=node)


@rewrites(
    aten.index_select.default,
    aten.index_add.default,
    aten.index_copy.default,
    aten.index_reduce.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
)
def _one_place(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Of an index without dims, one place; what is taken of a number is the number."""
    index, meta = run.tensor(a["index"]), run.tensor(a["self"])
    if node.target is aten.index_select.default and not meta.shape:
        return a["self"]
    if index.shape:
        return NotImplemented
    given = {argument.name: a[argument.name] for argument in node.target._schema.arguments}  # type: ignore[union-attr]
    given["index"] = run.call(aten.reshape.default, (a["index"], [1]), replace(index, shape=(1,)), like=node)
    named = {"alpha": given.pop("alpha")} if "alpha" in given else {}
    named |= {"include_self": given.pop("include_self")} if "include_self" in given else {}
    out = meta_of(node.meta["val"])
    assert out is not None
    return run.call(node.target, tuple(given.values()), out, like=node, **named)


@rewrites(aten.embedding.default)
def _with_dense_gradient(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Gradients that name the rows they are of are no whole tensors, which replicas could add."""
    if not a["sparse"]:
        return NotImplemented
    meta = meta_of(node.meta["val"])
    assert meta is not None
    return run.call(node.target, tuple(({**a, "sparse": False}).values()), meta, like=node)


@rewrites(aten.linear.default)
def _of_one_output(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """A weight without outputs makes one number of each row."""
    meta, bias = meta_of(node.meta["val"]), a["bias"]
    if len(run.tensor(a["weight"]).shape) != 1 or meta is None:
        return NotImplemented
    made = run.call(aten.matmul.default, (a["input"], a["weight"]), meta, like=node)
    return made if bias is None else run.call(aten.add.Tensor, (made, bias), meta, like=node)


@rewrites(aten.swapaxes.default, aten.swapdims.default)
def _swapped(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return NotImplemented if run.tensor(a["self"]).shape else a["self"]


def _full(run: Cleaner, node: fx.Node, value: Any) -> Any:
    meta = meta_of(node.meta["val"])
    assert isinstance(meta, TensorMeta)
    return run.call(aten.full.default, (list(meta.shape), value), meta, like=node, dtype=torch_dtype(meta.dtype))


@rewrites(
    aten.new_zeros.default,
    aten.new_empty.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty.memory_format,
    aten.empty_permuted.default,
)
def _new(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Made from sizes alone; nobody may rely on what an empty tensor holds."""
    return _full(run, node, 1 if node.target is aten.new_ones.default else a.get("fill_value", 0))


@rewrites(aten.zeros_like.default, aten.ones_like.default)
def _one_number(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """What is made like one number, a sum over samples perhaps, depends on no sample."""
    if run.tensor(a["self"]).shape:
        return NotImplemented
    return _full(run, node, 1 if node.target is aten.ones_like.default else 0)


@rewrites(aten.add.Tensor, aten.sub.Tensor)
def _added_number(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """``loss = 0; loss = loss + ...``, ``loss + 1e-3``: nothing, or a value that joins a sum as any other does."""
    other, meta = a["other"], meta_of(node.meta["val"])
    if isinstance(other, fx.Node) or run.tensor(a["self"]) != meta or meta.shape or a["alpha"] != 1:
        return NotImplemented
    if other == 0:
        return a["self"]
    return run.call(node.target, (a["self"], _full(run, node, other)), meta, like=node)


@rewrites(aten.bilinear.default)
def _bilinear(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """x W y for each feature: a product of x with all of W, then with y, summed."""
    (features, first, second), dtype = run.tensor(a["weight"]).shape, run.tensor(a["weight"]).dtype
    lead = run.tensor(a["input1"]).shape[:-1]
    turned = TensorMeta((features, second, first), dtype)
    weight = run.call(aten.transpose.int, (a["weight"], 1, 2), turned, like=node)
    flat = TensorMeta((features * second, first), dtype)
    weight = run.call(aten.reshape.default, (weight, list(flat.shape)), flat, like=node)
    half = run.call(aten.linear.default, (a["input1"], weight), TensorMeta((*lead, flat.shape[0]), dtype), like=node)
    wide = TensorMeta((*lead, features, second), dtype)
    half = run.call(aten.reshape.default, (half, list(wide.shape)), wide, like=node)
    other = TensorMeta((*lead, 1, second), dtype)
    right = run.call(aten.unsqueeze.default, (a["input2"], len(lead)), other, like=node)
    product = run.call(aten.mul.Tensor, (half, right), wide, like=node)
    made = run.cast(node, run.summed(node, product, [len(lead) + 1]), dtype)
    if a["bias"] is None:
        return made
    return run.call(aten.add.Tensor, (made, a["bias"]), TensorMeta((*lead, features), dtype), like=node)
