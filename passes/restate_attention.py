"""Restate attention: fused, as our op, where no dropout is drawn in it; else as its products."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cost_model.tensor import TensorMeta
from passes.dependence import ancestors
from passes.graph import Meta, meta_of
from passes.restate import rewrites
from passes.restate_random import dropped, scaled

if TYPE_CHECKING:
    from passes.clean import Cleaner

aten = torch.ops.aten
_CPU = torch.device("cpu")


@rewrites(aten.scaled_dot_product_attention.default)
def _attention(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Fused attention as our op; key and value heads repeated for grouped queries.

    Its kernels draw no dropout, give no gradient of the mask, and take 4 dims with values as wide as keys: else it is
    what torch makes of it then, to be priced as it runs.
    """
    query, key, value = a["query"], a["key"], a["value"]
    meta = run.tensor(query)
    is_learned = a["attn_mask"] is not None and run.trainable.intersection(ancestors([a["attn_mask"]]))
    is_fused = len(meta.shape) == 4 and run.tensor(value).shape[-1] == meta.shape[-1] and not is_learned
    if a["dropout_p"] or not is_fused:
        return NotImplemented if a["enable_gqa"] and len(meta.shape) != 4 else _explicit(run, node, a)
    if a["enable_gqa"]:
        repeat = meta.shape[1] // run.tensor(key).shape[1]
        key, value = (_repeat_heads(run, node, x, repeat) for x in (key, value))
    batch, heads, length, _ = meta.shape
    outputs: Meta = (meta, TensorMeta((batch, heads, length), "float32" if meta.dtype != "float64" else "float64"))
    mask = _additive(run, node, a["attn_mask"], meta.dtype)
    args = (query, key, value, mask, a["is_causal"], a["scale"])
    made = run.call(torch.ops.autopar.attention.default, args, outputs, like=node)
    return run.call(operator.getitem, (made, 0), meta, like=node)


def _additive(run: Cleaner, node: fx.Node, mask: fx.Node | None, dtype: str) -> fx.Node | None:
    """A mask as kernels take it: of 2 or 4 dims, if boolean 0 where attention is allowed and -inf elsewhere."""
    if mask is None:
        return None
    meta = run.tensor(mask)
    if len(meta.shape) not in (2, 4):
        rank = 2 if len(meta.shape) < 2 else 4
        shape = (1,) * (rank - len(meta.shape)) + meta.shape
        meta = TensorMeta(shape, meta.dtype)
        mask = run.call(aten.reshape.default, (mask, list(shape)), meta, like=node)
    if meta.dtype == "bool":
        mask = run.call(aten.where.Scalar, (mask, 0.0, float("-inf")), replace(meta, dtype="float32"), like=node)
    return run.cast(node, mask, dtype)


def _repeat_heads(run: Cleaner, node: fx.Node, x: fx.Node, repeat: int) -> fx.Node:
    meta = run.tensor(x)
    batch, heads, length, width = meta.shape
    for target, arg, shape in (
        (aten.unsqueeze.default, 2, (batch, heads, 1, length, width)),
        (aten.expand.default, [batch, heads, repeat, length, width], (batch, heads, repeat, length, width)),
        (aten.reshape.default, [batch, heads * repeat, length, width], (batch, heads * repeat, length, width)),
    ):
        x = run.call(target, (x, arg), TensorMeta(shape, meta.dtype), like=node)
    return x


def _explicit(run: Cleaner, node: fx.Node, a: dict[str, Any]) -> Any:
    """Scores, softmax, dropout and the sum of values, whatever the rank; grouped keys and values repeated. Queries that
    no key is allowed for get nothing."""
    out = meta_of(node.meta["val"])
    assert isinstance(out, TensorMeta)
    query, key, value = a["query"], a["key"], a["value"]
    meta = run.tensor(query)
    if a["enable_gqa"]:
        repeat = meta.shape[-3] // run.tensor(key).shape[-3]
        key, value = (_repeat_heads(run, node, x, repeat) for x in (key, value))
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(meta.shape[-1])
    of_keys = run.tensor(key).shape
    turned = TensorMeta((*of_keys[:-2], of_keys[-1], of_keys[-2]), meta.dtype)
    keys = run.call(aten.transpose.int, (key, -2, -1), turned, like=node)
    scores = TensorMeta((*meta.shape[:-1], of_keys[-2]), meta.dtype)
    made = run.call(aten.matmul.default, (scaled(run, node, query, scale, 0), keys), scores, like=node)
    for mask in (a["attn_mask"], _causal(run, node, scores) if a["is_causal"] else None):
        made = made if mask is None else _masked(run, node, made, mask)
    softmax = aten.softmax.int if a["attn_mask"] is None else aten._safe_softmax.default
    weights = run.call(softmax, (made, -1), scores, like=node)
    return run.call(aten.matmul.default, (dropped(run, node, weights, a["dropout_p"]), value), out, like=node)


def _causal(run: Cleaner, node: fx.Node, scores: TensorMeta) -> fx.Node:
    """True where a key is not after the query."""
    shape = TensorMeta(scores.shape[-2:], "bool")
    ones = run.call(aten.ones.default, (list(shape.shape),), shape, like=node, dtype=torch.bool, device=_CPU)
    made = run.call(aten.tril.default, (ones,), shape, like=node)
    assert isinstance(made, fx.Node)
    return made


def _masked(run: Cleaner, node: fx.Node, scores: fx.Node, mask: fx.Node) -> Any:
    """A boolean mask says where attention is allowed, any other is added."""
    meta = run.tensor(scores)
    if run.tensor(mask).dtype != "bool":
        return run.call(aten.add.Tensor, (scores, mask), meta, like=node)
    return run.call(aten.where.ScalarOther, (mask, scores, -math.inf), meta, like=node)
