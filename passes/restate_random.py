"""Restate random calls in ours, whose values do not depend on the plan.

What they draw is what torch draws in distribution, not in value. What has no form here is refused by ``clean``.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes import random_vocabulary as drawn
from passes.graph import meta_of
from passes.restate import rewrites

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_SELU_ALPHA = 1.7580993408473766
"""Minus the value that SELU saturates at (scale x alpha of Klambauer et al., 2017): what alpha dropout puts for 0."""


def _out(node: fx.Node) -> TensorMeta:
    meta = meta_of(node.meta["val"])
    meta = meta[0] if isinstance(meta, tuple) else meta
    assert isinstance(meta, TensorMeta)
    return meta


def _draw(run: Cleaner, node: fx.Node, op: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Numbers of one of our distributions in a shape, as a dtype."""
    natural = "int64" if op is drawn.random_integers else "float32"
    return run.cast(node, run.call(op, (None, []), TensorMeta(shape, natural), like=node), dtype)


def scaled(run: Cleaner, node: fx.Node, x: fx.Node, factor: float, offset: float) -> Any:
    """x * factor + offset."""
    meta = run.tensor(x)
    for target, number, none in ((aten.mul.Tensor, factor, 1), (aten.add.Tensor, offset, 0)):
        x = x if number == none else run.call(target, (x, number), meta, like=node)
    return x


def _combined(run: Cleaner, node: fx.Node, target: Any, *operands: Any) -> Any:
    """An elementwise call whose result has the shape and dtype of the random call."""
    return run.call(target, operands, _out(node), like=node)


# --- Dropout


@rewrites(aten.dropout.default, aten.native_dropout.default)
def _dropout(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    is_native = node.target is aten.native_dropout.default
    made = a["input"] if not a["train"] else dropped(run, node, a["input"], a["p"])
    return [made, None] if is_native else made


def dropped(run: Cleaner, node: fx.Node, x: fx.Node, p: float) -> Any:
    """x with dropout."""
    if p in (0, 1):
        return scaled(run, node, x, 1 - p, 0)
    meta = run.tensor(x)
    made = run.call(drawn.DROPOUT, (x, None, [], p), (meta, TensorMeta(meta.shape, "bool")), like=node)
    return run.call(operator.getitem, (made, 0), meta, like=node)


@rewrites(aten.feature_dropout.default)
def _feature_dropout(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Whole channels: one number each, kept ones scaled."""
    if not a["train"] or a["p"] == 0:
        return a["input"]
    if a["p"] == 1:
        return scaled(run, node, a["input"], 0, 0)
    kept = _kept(run, node, _channels(run.tensor(a["input"])), a["p"])
    return _combined(run, node, aten.mul.Tensor, a["input"], scaled(run, node, kept, 1 / (1 - a["p"]), 0))


@rewrites(aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def _alpha_dropout(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """x where kept, SELU's lowest value elsewhere, scaled and shifted to the mean and variance from before."""
    p, meta = a["p"], run.tensor(a["input"])
    if not a["train"] or p == 0:
        return a["input"]
    if p == 1:
        return scaled(run, node, a["input"], 0, 0)
    shape = _channels(meta) if node.target is aten.feature_alpha_dropout.default else meta.shape
    scale = 1 / math.sqrt((_SELU_ALPHA**2 * p + 1) * (1 - p))
    kept = _kept(run, node, shape, p)
    shift = scaled(run, node, kept, _SELU_ALPHA * scale, _SELU_ALPHA * scale * (p - 1))
    product = _combined(run, node, aten.mul.Tensor, a["input"], scaled(run, node, kept, scale, 0))
    return _combined(run, node, aten.add.Tensor, product, shift)


def _channels(meta: TensorMeta) -> tuple[int, ...]:
    return (*meta.shape[:2], *(1 for _ in meta.shape[2:]))


def _kept(run: Cleaner, node: fx.Node, shape: tuple[int, ...], p: float) -> Any:
    """1 with probability 1 - p, else 0."""
    return _bernoulli(run, node, TensorMeta(shape, _out(node).dtype), 1 - p)


@rewrites(aten.rrelu.default)
def _rrelu(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """A leaky ReLU of which each slope is drawn; of the mean slope where nothing is trained."""
    if not a["training"]:
        return run.call(aten.leaky_relu.default, (a["self"], (a["lower"] + a["upper"]) / 2), _out(node), like=node)
    out = _out(node)
    slopes = _draw(run, node, drawn.uniform, out.shape, out.dtype)
    slopes = scaled(run, node, slopes, a["upper"] - a["lower"], a["lower"])
    below = _combined(run, node, aten.mul.Tensor, a["self"], slopes)
    positive = run.call(aten.gt.Scalar, (a["self"], 0), TensorMeta(out.shape, "bool"), like=node)
    return _combined(run, node, aten.where.self, positive, a["self"], below)


# --- Distributions


@rewrites(aten.rand.default, aten.rand_like.default)
def _rand(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return _draw(run, node, drawn.uniform, _out(node).shape, _out(node).dtype)


@rewrites(aten.uniform.default)
def _uniform(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return scaled(run, node, _rand(run, node, a), a["to"] - a["from"], a["from"])


@rewrites(aten.randn.default, aten.randn_like.default)
def _randn(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return _draw(run, node, drawn.normal, _out(node).shape, _out(node).dtype)


@rewrites(aten.normal.float_float, aten.normal_functional.default)
def _normal_of_numbers(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return scaled(run, node, _randn(run, node, a), a["std"], a["mean"])


@rewrites(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor)
def _normal(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    scaled = _combined(run, node, aten.mul.Tensor, _randn(run, node, a), a["std"])
    return _combined(run, node, aten.add.Tensor, scaled, a["mean"])


@rewrites(aten.exponential.default)
def _exponential(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    logarithm = _combined(run, node, aten.log.default, _rand(run, node, a))
    return scaled(run, node, logarithm, -1 / a["lambd"], 0)


@rewrites(aten.bernoulli.p)
def _bernoulli_of_number(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return _bernoulli(run, node, _out(node), a["p"])


@rewrites(aten.bernoulli.default)
def _bernoulli_of_self(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return _bernoulli(run, node, _out(node), a["self"])


@rewrites(aten.bernoulli.Tensor)
def _bernoulli_of_tensor(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    return _bernoulli(run, node, _out(node), a["p"])


def _bernoulli(run: Cleaner, node: fx.Node, out: TensorMeta, p: Any) -> Any:
    """1 with probability p (a number or a tensor), else 0."""
    number = run.call(drawn.uniform, (None, []), TensorMeta(out.shape, "float32"), like=node)
    target = aten.lt.Tensor if isinstance(p, fx.Node) else aten.lt.Scalar
    below = run.call(target, (number, p), TensorMeta(out.shape, "bool"), like=node)
    return run.cast(node, below, out.dtype)


@rewrites(aten.randint.default, aten.randint.low, aten.randint_like.default, aten.randint_like.low_dtype)
def _randint(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    out, low = _out(node), a.get("low", 0)
    drawn_at = run.call(drawn.random_integers, (None, []), TensorMeta(out.shape, "int64"), like=node)
    within = run.call(aten.remainder.Scalar, (drawn_at, a["high"] - low), TensorMeta(out.shape, "int64"), like=node)
    return run.cast(node, scaled(run, node, within, 1, low), out.dtype)


@rewrites(aten.randperm.default)
def _randperm(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """The order in which random numbers are sorted."""
    numbers = _draw(run, node, drawn.random_integers, _out(node).shape, "int64")
    order = run.call(aten.argsort.default, (numbers,), TensorMeta(_out(node).shape, "int64"), like=node)
    return run.cast(node, order, _out(node).dtype)


@rewrites(aten.multinomial.default)
def _multinomial(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """One draw: the largest of weights over exponential numbers, as torch does it; no gradient passes."""
    weights = a["self"]
    if a["num_samples"] != 1:
        return NotImplemented
    meta = run.tensor(weights)
    logarithm = run.call(aten.log.default, (_draw(run, node, drawn.uniform, meta.shape, meta.dtype),), meta, like=node)
    times = run.call(aten.neg.default, (logarithm,), meta, like=node)
    raced = run.call(aten.div.Tensor, (weights, times), meta, like=node)
    return run.call(aten.argmax.default, (raced, -1, True), _out(node), like=node)
