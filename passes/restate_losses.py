"""Restate losses as sums over the whole batch and counts of it, which shards and microbatches add up to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.ops.loss import POINTWISE
from cost_model.tensor import TensorMeta
from passes.graph import meta_of
from passes.restate import HALF, divided, rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_NONE, _MEAN, _SUM = 0, 1, 2


def _rows(run: Cleaner, node: fx.Node, logits: fx.Node, labels: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Classes last and all other dims flattened: [n, c, ...] and [n, ...] become [rows, c] and [rows]."""
    meta, rank = run.tensor(logits), len(run.tensor(logits).shape)
    if rank == 2:
        return logits, labels
    order = [0, *range(2, rank), 1]
    moved = TensorMeta(tuple(meta.shape[d] for d in order), meta.dtype)
    logits = run.call(aten.permute.default, (logits, order), moved, like=node)
    count = run.tensor(labels).numel
    flat = [count, meta.shape[1]]
    logits = run.call(aten.reshape.default, (logits, flat), TensorMeta(tuple(flat), meta.dtype), like=node)
    whole = TensorMeta((count,), run.tensor(labels).dtype)
    return logits, run.call(aten.reshape.default, (labels, [count]), whole, like=node)


@rewrites(aten.cross_entropy_loss.default)
def _cross_entropy(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """mean -> sum / count of labels that are not ignored; both add up over shards and microbatches."""
    logits, labels = a["self"], a["target"]
    if run.tensor(labels).is_floating or len(run.tensor(logits).shape) < 2:
        return NotImplemented
    if a["weight"] is not None or a["reduction"] == _NONE:
        return _Picked(run, node, a).loss()
    logits, labels = _rows(run, node, logits, labels)
    dtype = run.tensor(logits).dtype
    wide = TensorMeta((), "float32" if dtype in HALF else dtype)
    args = (logits, labels, a["ignore_index"], a["label_smoothing"])
    total = run.call(torch.ops.autopar.cross_entropy_sum.default, args, wide, like=node)
    if a["reduction"] == _SUM:
        return run.cast(node, total, dtype)
    counted = TensorMeta((), "float32")
    count = run.call(torch.ops.autopar.count_labels.default, (labels, a["ignore_index"]), counted, like=node)
    mean = run.call(aten.div.Tensor, (total, run.cast(node, count, wide.dtype)), wide, like=node)
    return run.cast(node, mean, dtype)


@rewrites(aten.mse_loss.default)
def _mse(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    if run.tensor(a["self"]).shape != run.tensor(a["target"]).shape:
        return NotImplemented
    meta, result = run.tensor(a["self"]), meta_of(node.meta["val"])
    assert isinstance(result, TensorMeta)
    difference = run.call(aten.sub.Tensor, (a["self"], a["target"]), meta, like=node)
    square = run.call(aten.pow.Tensor_Scalar, (difference, 2), meta, like=node)
    if a["reduction"] == _NONE:
        return square
    total = run.summed(node, square)
    return run.cast(node, total, meta.dtype) if a["reduction"] == _SUM else divided(run, node, total, square, result)


def _averaged(run: Cleaner, node: fx.Node, each: fx.Node, reduction: int) -> Any:
    """Losses of the elements as the op gives them: as they are (0), their mean (1) or their sum (2)."""
    result = meta_of(node.meta["val"])
    assert isinstance(result, TensorMeta)
    if reduction == _NONE:
        return each
    total = run.summed(node, each)
    return run.cast(node, total, result.dtype) if reduction == _SUM else divided(run, node, total, each, result)


@rewrites(*(getattr(aten, name).default for name in POINTWISE.split() if name not in ("mse_loss", "poisson_nll_loss")))
def _pointwise_loss(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """The reduction taken out of the op, where it is the mean or the sum of all elements."""
    shapes = [run.tensor(v).shape for v in a.values() if isinstance(v, fx.Node)]
    whole = tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    out = TensorMeta(whole, run.tensor(next(iter(a.values()))).dtype)
    if a["reduction"] == _NONE:
        return NotImplemented
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**a, "reduction": 0}
    args = tuple(given[arg.name] for arg in schema if not arg.kwarg_only)
    kwargs = {arg.name: given[arg.name] for arg in schema if arg.kwarg_only}
    each = run.call(node.target, args, out, like=node, **kwargs)
    return _averaged(run, node, each, a["reduction"])


@rewrites(aten.nll_loss_nd.default, aten.nll_loss.default)
def _nll(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """The log-probability of each label, gathered; labels that are ignored count nothing."""
    source, labels = a["self"], a["target"]
    if a["weight"] is not None or a["reduction"] == _NONE or len(run.tensor(source).shape) < 2:
        return NotImplemented
    source, labels = _rows(run, node, source, labels)
    count, dtype, ids = run.tensor(labels).numel, run.tensor(source).dtype, run.tensor(labels).dtype
    safe = run.call(aten.clamp_min.default, (labels, 0), TensorMeta((count,), ids), like=node)
    column = run.call(aten.unsqueeze.default, (safe, 1), TensorMeta((count, 1), ids), like=node)
    picked = run.call(aten.gather.default, (source, 1, column), TensorMeta((count, 1), dtype), like=node)
    row = run.call(aten.reshape.default, (picked, [count]), TensorMeta((count,), dtype), like=node)
    lost = run.call(aten.neg.default, (row,), TensorMeta((count,), dtype), like=node)
    kept = run.call(aten.ne.Scalar, (labels, a["ignore_index"]), TensorMeta((count,), "bool"), like=node)
    each = run.call(aten.where.ScalarOther, (kept, lost, 0.0), TensorMeta((count,), dtype), like=node)
    total = run.summed(node, each)
    if a["reduction"] == _SUM:
        return run.cast(node, total, dtype)
    counted = TensorMeta((), "float32")
    number = run.call(torch.ops.autopar.count_labels.default, (labels, a["ignore_index"]), counted, like=node)
    wide = run.tensor(total)
    mean = run.call(aten.div.Tensor, (total, run.cast(node, number, wide.dtype)), wide, like=node)
    return run.cast(node, mean, dtype)


class _Picked:
    """-w[y] ((1 - s) log p[y] + s / C sum_c w[c] / w[y] log p[c]) of each label y, s being the smoothing."""

    def __init__(self, run: Cleaner, node: fx.Node, a: dict[str, Any]) -> None:
        self.run, self.node, self.a = run, node, a
        self.classes, self.each = run.tensor(a["self"]), run.tensor(a["target"]).shape
        self.meta = TensorMeta(self.each, self.classes.dtype)

    def call(self, op: Any, args: tuple[Any, ...], meta: TensorMeta | None = None) -> fx.Node:
        made: fx.Node = self.run.call(op, args, meta or self.meta, like=self.node)
        return made

    def loss(self) -> Any:
        run, a, labels = self.run, self.a, self.a["target"]
        ignored = self.call(aten.eq.Scalar, (labels, a["ignore_index"]), TensorMeta(self.each, "bool"))
        known = self.call(aten.masked_fill.Scalar, (labels, ignored, 0), run.tensor(labels))
        likely = self.call(aten.log_softmax.int, (a["self"], 1), self.classes)
        chosen = self._at(likely, known)
        weight = None
        if a["weight"] is not None:
            weight = self.call(aten.index.Tensor, (a["weight"], [known]))
            chosen = self.call(aten.mul.Tensor, (chosen, weight))
        loss = self._smoothed(likely, chosen) if a["label_smoothing"] else chosen
        loss = self.call(aten.masked_fill.Scalar, (self.call(aten.neg.default, (loss,)), ignored, 0.0))
        if a["reduction"] == _NONE:
            return loss
        assert weight is not None
        total = run.summed(self.node, loss)
        counted = self.call(aten.masked_fill.Scalar, (weight, ignored, 0.0))
        return self._divided(total, run.summed(self.node, counted)) if a["reduction"] == _MEAN else total

    def _at(self, likely: fx.Node, labels: fx.Node) -> fx.Node:
        """What stands at each label, along dim 1."""
        one = (self.each[0], 1, *self.each[1:])
        index = self.call(aten.unsqueeze.default, (labels, 1), replace(self.run.tensor(labels), shape=one))
        picked = self.call(aten.gather.default, (likely, 1, index), replace(self.meta, shape=one))
        return self.call(aten.squeeze.dim, (picked, 1))

    def _smoothed(self, likely: fx.Node, chosen: fx.Node) -> fx.Node:
        smoothing, count = self.a["label_smoothing"], self.classes.shape[1]
        if self.a["weight"] is not None:
            along = (count, *[1] * (len(self.each) - 1))
            weights = self.call(aten.reshape.default, (self.a["weight"], list(along)), replace(self.meta, shape=along))
            likely = self.call(aten.mul.Tensor, (likely, weights), self.classes)
        every = self.run.summed(self.node, likely, [1], False)
        spread = self.call(aten.mul.Tensor, (every, smoothing / count))
        return self.call(aten.add.Tensor, (self.call(aten.mul.Tensor, (chosen, 1.0 - smoothing)), spread))

    def _divided(self, total: fx.Node, count: fx.Node) -> fx.Node:
        return self.call(aten.div.Tensor, (total, count), self.run.tensor(total))
