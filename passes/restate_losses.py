"""Restate the cross entropy of each element, or with weights of classes, in ops that know samples and places apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes.restate import REWRITES, rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_NONE, _MEAN = 0, 1
_summed_cross_entropy = REWRITES[aten.cross_entropy_loss.default]


@rewrites(aten.cross_entropy_loss.default)
def _cross_entropy(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Sums and means without weights have an op of their own; the others are picked from a log-softmax."""
    logits, labels = run.tensor(a["self"]), run.tensor(a["target"])
    if (a["weight"] is None and a["reduction"] != _NONE) or labels.is_floating or len(logits.shape) < 2:
        return _summed_cross_entropy(run, node, a)
    return _Picked(run, node, a).loss()


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
