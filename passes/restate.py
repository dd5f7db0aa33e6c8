"""Restate: ops in the forms whose rules are simple.

No-op casts and copies of what is contiguous go; attention, cross entropy, means, losses and repeats are stated in
other ops. A mean becomes a sum and a product with 1/count, where the count is the global batch's, so that shards and
microbatches simply add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes.graph import meta_of

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
HALF = ("float16", "bfloat16")

Rewrite = Callable[["Cleaner", fx.Node, dict[str, Any]], Any]
REWRITES: dict[Any, Rewrite] = {}


def rewrites(*targets: Any) -> Callable[[Rewrite], Rewrite]:
    def register(function: Rewrite) -> Rewrite:
        REWRITES.update(dict.fromkeys(targets, function))
        return function

    return register


@rewrites(aten.detach_.default, aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.alias.default)
def _identity(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return next(iter(a.values()))


@rewrites(aten.contiguous.default)
def _contiguous(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    value = node.args[0].meta.get("val")  # type: ignore[union-attr]
    return a["self"] if value is not None and value.is_contiguous() else NotImplemented


@rewrites(
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default
)
def _cast(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Only the dtype counts: devices belong to the runtime. ``torch.vmap`` casts numbers, too."""
    meta = meta_of(node.meta["val"])
    assert isinstance(meta, TensorMeta)
    if not isinstance(a["self"], fx.Node):
        return run.call(aten.full.default, ([], a["self"]), meta, like=node, dtype=getattr(torch, meta.dtype))
    return run.cast(node, a["self"], meta.dtype)


@rewrites(aten.slice.Tensor)
def _slice(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    extent = run.tensor(a["self"]).shape[a["dim"]]
    whole = (a["start"] or 0) == 0 and (a["end"] is None or a["end"] >= extent) and a["step"] == 1
    return a["self"] if whole else NotImplemented


@rewrites(
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def _view(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """view -> reshape with its shape spelled out: local strides may not allow the view, local sizes may be 1."""
    meta, source = meta_of(node.meta["val"]), a["self"]
    assert isinstance(meta, TensorMeta)
    if source.target is aten.reshape.default:
        source = source.args[0]
    if run.tensor(source).shape == meta.shape:
        return source
    return run.call(aten.reshape.default, (source, list(meta.shape)), meta, like=node)


@rewrites(aten.reshape.default)
def _reshape(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return _view(run, node, a)


@rewrites(aten.mean.default, aten.mean.dim)
def _mean(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    source, meta = a["self"], meta_of(node.meta["val"])
    assert isinstance(meta, TensorMeta)
    if a.get("dtype") is not None:
        source = run.cast(node, source, meta.dtype)
    return divided(run, node, run.summed(node, source, a.get("dim"), a.get("keepdim", False)), source, meta)


def divided(run: Cleaner, node: fx.Node, total: fx.Node, source: fx.Node, meta: TensorMeta) -> fx.Node:
    """A sum of all of ``source`` made a mean by the count of the whole tensor."""
    count = run.tensor(source).numel // max(meta.numel, 1)
    scaled = run.call(aten.mul.Tensor, (total, 1.0 / max(count, 1)), run.tensor(total), like=node)
    return run.cast(node, scaled, meta.dtype)


@rewrites(aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction, aten.std.dim, aten.std.default)
def _variance(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Over samples, as sums of theirs, which parts of a batch have a share in; the gradient of no deviation is zero."""
    source, meta, given = a["self"], run.tensor(a["self"]), a.get("correction")
    correction = float(a.get("unbiased", True)) if given is None else given
    dims = [d % len(meta.shape) for d in a.get("dim") or range(len(meta.shape))]
    count = math.prod(meta.shape[d] for d in dims)
    if 0 not in dims or count <= correction:
        return NotImplemented
    total = run.summed(node, source, dims, True)
    mean = run.call(aten.mul.Tensor, (total, 1.0 / count), run.tensor(total), like=node)
    centred = run.call(aten.sub.Tensor, (source, mean), meta, like=node)
    squares = run.call(aten.mul.Tensor, (centred, centred), meta, like=node)
    spread = run.summed(node, squares, dims, a.get("keepdim", False))
    out = run.tensor(spread)
    variance = run.call(aten.mul.Tensor, (spread, 1.0 / (count - correction)), out, like=node)
    if "var" in str(node.target):
        return variance
    none = run.call(aten.eq.Scalar, (variance, 0), replace(out, dtype="bool"), like=node)
    some = run.call(aten.masked_fill.Scalar, (variance, none, 1.0), out, like=node)
    root = run.call(aten.sqrt.default, (some,), out, like=node)
    return run.call(aten.masked_fill.Scalar, (root, none, 0.0), out, like=node)


@rewrites(aten.broadcast_tensors.default)
def _broadcast(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    metas = meta_of(node.meta["val"])
    assert isinstance(metas, tuple)
    made = []
    for source, meta in zip(a["tensors"], metas, strict=True):
        assert meta is not None
        is_whole = run.tensor(source).shape == meta.shape
        made.append(source if is_whole else run.call(aten.expand.default, (source, list(meta.shape)), meta, like=node))
    return made


@rewrites(aten.repeat.default)
def _repeat(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Copies side by side along each dim: a dim of copies in front of each, expanded, then merged."""
    source, counts = a["self"], list(a["repeats"])
    meta = run.tensor(source)
    shape = (1,) * (len(counts) - len(meta.shape)) + meta.shape
    return _expanded(run, node, source, [(count, extent) for count, extent in zip(counts, shape, strict=True)], True)


@rewrites(aten.repeat_interleave.self_int)
def _repeat_interleave(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Each element several times: a dim of copies behind the one named, expanded, then merged."""
    source, meta = a["self"], run.tensor(a["self"])
    if a["dim"] is None or not meta.shape:
        return NotImplemented
    dim = a["dim"] % len(meta.shape)
    pairs = [(a["repeats"] if d == dim else 1, extent) for d, extent in enumerate(meta.shape)]
    return _expanded(run, node, source, pairs, False)


def _expanded(run: Cleaner, node: fx.Node, x: fx.Node, pairs: list[tuple[int, int]], copies_first: bool) -> Any:
    """``pairs``: (copies, extent) of each dim; dims of size 1 are simply expanded."""
    dtype = run.tensor(x).dtype
    narrow, wide, merged = [], [], []
    for count, extent in pairs:
        merged.append(count * extent)
        if count == 1 or extent == 1:
            narrow.append(extent)
            wide.append(count * extent)
        else:
            narrow += [1, extent] if copies_first else [extent, 1]
            wide += [count, extent] if copies_first else [extent, count]
    for target, shape in ((aten.reshape.default, narrow), (aten.expand.default, wide), (aten.reshape.default, merged)):
        if tuple(shape) != run.tensor(x).shape:
            x = run.call(target, (x, shape), TensorMeta(tuple(shape), dtype), like=node)
    return x


@rewrites(aten.index.Tensor)
def _index(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """``x[arange(n), i]`` picks one row of each of n samples: a gather along dim 1, in which samples stay apart."""
    source, indices, meta = a["self"], a["indices"], run.tensor(a["self"])
    if len(indices) != 2 or any(i is None for i in indices) or not _counts(run, indices[0], meta.shape[0]):
        return NotImplemented
    rows, rest = meta.shape[0], meta.shape[2:]
    at = run.tensor(indices[1])
    if at.shape != (rows,) or at.is_floating or at.dtype in ("bool", "uint8"):
        return NotImplemented
    wrapped = run.call(aten.remainder.Scalar, (indices[1], meta.shape[1]), at, like=node)
    narrow, wide = [rows] + [1] * (1 + len(rest)), [rows, 1, *rest]
    index = run.call(aten.reshape.default, (wrapped, narrow), TensorMeta(tuple(narrow), at.dtype), like=node)
    if wide != narrow:
        index = run.call(aten.expand.default, (index, wide), TensorMeta(tuple(wide), at.dtype), like=node)
    taken = run.call(aten.gather.default, (source, 1, index), TensorMeta(tuple(wide), meta.dtype), like=node)
    return run.call(aten.reshape.default, (taken, [rows, *rest]), TensorMeta((rows, *rest), meta.dtype), like=node)


def _counts(run: Cleaner, node: fx.Node, extent: int) -> bool:
    """Whether a value is arange(extent)."""
    while node.target in (aten.to.dtype, aten.detach.default):
        node = node.args[0]  # type: ignore[assignment]
    if node.target is aten.arange.start and node.args[0] == 0:
        return bool(node.args[1] == extent)
    return node.target is aten.arange.default and bool(node.args[0] == extent)


@rewrites(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def _global_pool(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Down to one position: the mean over all positions."""
    meta, out = run.tensor(a["self"]), meta_of(node.meta["val"])
    assert isinstance(out, TensorMeta)
    count = len(a["output_size"])
    if any(extent != 1 for extent in out.shape[len(out.shape) - count :]):
        return NotImplemented
    dims = list(range(len(meta.shape) - count, len(meta.shape)))
    return divided(run, node, run.summed(node, a["self"], dims, True), a["self"], out)


@rewrites(aten.copy.default, aten.fill.Tensor)
def _filled(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """What functionalising leaves of an assignment: the values in the shape and dtype of what they replace."""
    values, meta = a["src"] if "src" in a else a["value"], run.tensor(a["self"])
    values = run.cast(node, values, meta.dtype)
    if run.tensor(values).shape == meta.shape:
        return values
    return run.call(aten.expand.default, (values, list(meta.shape)), meta, like=node)


@rewrites(aten.fill.Scalar)
def _filled_with_number(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return run.call(aten.full_like.default, (a["self"], a["value"]), run.tensor(a["self"]), like=node)


@rewrites(aten._native_batch_norm_legit_functional.default)
def _functional_batch_norm(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """(output, statistics, new running statistics): the last become gradients of our op.

    A later batch norm over the same statistics reads those of the first one: both give a term of the new values.
    """
    later = 1.0
    for momentum in _later_momenta(node):
        later *= 1 - momentum
    is_first = a["running_mean"] is None or node.args[3].op == "placeholder"  # type: ignore[union-attr]
    keep = (1 - a["momentum"]) * later if is_first else 0.0
    out = _normed(run, node, {**a, "momentum": a["momentum"] * later}, keep)
    return [out, None, None, a["running_mean"], a["running_var"]]


def _later_momenta(node: fx.Node) -> Iterator[float]:
    """Of the batch norms that change the running mean that one makes, one after the other."""
    made = next((user for user in node.users if user.args[1] == 3), None)
    while made is not None and (later := next((u for u in made.users if u.target is node.target), None)) is not None:
        yield float(later.args[6])  # type: ignore[arg-type]
        made = next((user for user in later.users if user.args[1] == 3), None)


@rewrites(aten.batch_norm.default)
def _batch_norm(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return _normed(run, node, a, 0.0)


def _normed(run: Cleaner, node: fx.Node, a: dict[str, Any], keep: float) -> Any:
    meta = run.tensor(a["input"])
    tensors = tuple(a[name] for name in ("input", "weight", "bias", "running_mean", "running_var"))
    if a["training"]:
        args = (*tensors, a["momentum"], keep, a["eps"], 1)
        return run.call(torch.ops.autopar.batch_norm.default, args, meta, like=node)
    return run.call(aten.batch_norm.default, (*tensors, False, a["momentum"], a["eps"], False), meta, like=node)


@rewrites(aten._native_batch_norm_legit_no_training.default)
def _given_batch_norm(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return [_batch_norm(run, node, {**a, "training": False}), None, None]


@rewrites(aten._native_batch_norm_legit.no_stats)
def _batch_norm_without_statistics(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return [_normed(run, node, {**a, "running_mean": None, "running_var": None}, 0.0), None, None]
