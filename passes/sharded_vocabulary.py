"""Layers of which a factor is split over an axis by an algorithm: rows of attention or convolutions, experts, words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from passes.layer_vocabulary import CPU_ATTENTION, HALF, experts, with_rows
from passes.vocabulary import all_reduce, define, gather, like, shard_ids, take_shard


@define("attention_rows(Tensor q, Tensor k, Tensor v, float? scale, str axis, int size) -> (Tensor, Tensor)")
def _attention_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, axis: str, size: int
) -> tuple[Tensor, Tensor]:
    out, logsumexp = CPU_ATTENTION(q, k, v, 0.0, False, scale=scale)
    return out, logsumexp


@define(
    "attention_rows_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, float? scale, "
    "str axis, int size) -> (Tensor, Tensor, Tensor)"
)
def _attention_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v)


class _AttentionRows(Function):
    """Causal attention of a rank's queries, with keys and values whole."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, axis: str, size: int) -> Any:
        out, logsumexp = torch.ops.autopar.attention_rows.default(q, k, v, scale, axis, size)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.options = (scale, axis, size)
        ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made = torch.ops.autopar.attention_rows_backward.default(grads[0], *ctx.saved_tensors, *ctx.options)
        return *made, None, None, None


@define("class_shares(Tensor logits) -> (Tensor, Tensor)")
def _class_shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if logits.dtype in HALF else logits.dtype
    return logits.new_empty(logits.shape, dtype=dtype), logits.new_empty(logits.shape[:1], dtype=dtype)


@define("class_gradients(Tensor shares, Tensor factor, Tensor weight, Tensor ids, ScalarType dtype) -> Tensor")
def _class_gradients(shares: Tensor, factor: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return shares.new_empty(shares.shape, dtype=dtype)


class _VocabularyCrossEntropy(Function):
    """Sum of cross entropies of logits sharded along the classes: two all_reduces of [n], the logits stay sharded.

    Each rank's softmax is over its own classes, of which all of them together are a part that depends on the row alone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, axis: str, size: int) -> Any:
        shares, log_sums = torch.ops.autopar.class_shares.default(logits)
        largest = all_reduce(log_sums, axis, "max")
        ids = shard_ids(labels, axis, size, logits.shape[1])
        here = (ids >= 0).logical_and(labels != ignore_index)
        picked = logits.gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1).to(shares.dtype) - largest
        own = (log_sums - largest).exp()
        total, target = all_reduce(torch.stack([own, torch.where(here, picked, 0.0)]), axis, "sum").unbind(0)
        ctx.save_for_backward(shares, own / total, torch.where(here, ids, -1), labels)
        ctx.ignore_index, ctx.dtype = ignore_index, logits.dtype
        return torch.where(labels != ignore_index, total.log() - target, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        shares, part, ids, labels = ctx.saved_tensors
        weight = torch.where(labels != ctx.ignore_index, grads[0], 0.0)
        grad = torch.ops.autopar.class_gradients.default(shares, weight * part, weight, ids, ctx.dtype)
        return grad, None, None, None, None


def attention_rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None, axis: str, size: int) -> tuple[Tensor, Tensor]:
    """Causal attention of the queries that each rank of an axis holds, consecutive ones, to all keys before them."""
    q, k, v = (with_rows(x) for x in (q, k, v))
    return _AttentionRows.apply(q, k, v, scale, axis, size)  # type: ignore[no-any-return,no-untyped-call]


def shard_of_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    total: int,
    axis: str,
    size: int,
) -> Tensor:
    """``experts`` of which each rank of an axis holds consecutive ones; the result is Partial."""
    local: Tensor = shard_ids(index, axis, size, gate_up.shape[0])
    return experts(x, local, weights, gate_up, down, activation, total)


def vocabulary_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, axis: str, size: int) -> Tensor:
    """``cross_entropy_sum`` of logits sharded along the classes; equal on every rank of the axis."""
    return _VocabularyCrossEntropy.apply(logits, labels, ignore_index, axis, size)  # type: ignore[no-any-return,no-untyped-call]


def convolution_of_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dim: int,
    axis: str,
    size: int,
) -> Tensor:
    """A convolution of which each rank of an axis holds consecutive rows of spatial dim ``dim``, in and out."""
    count = weight.ndim - 2
    strides, pads, dilations = ([v[i % len(v)] for i in range(count)] for v in (stride, padding, dilation))
    place = dim - (x.ndim - count)
    after = dilations[place] * (weight.shape[2 + place] - 1) + 1 - strides[place] - pads[place]
    padded = with_halo(x, dim, pads[place], after, axis, size)
    pads[place] = 0
    convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[count]
    return convolve(padded, weight, bias, strides, pads, dilations, groups)


def with_halo(x: Tensor, dim: int, before: int, after: int, axis: str, size: int) -> Tensor:
    """Consecutive parts of a dim, each with the last rows of the part before it and the first of the one after it.

    The edges of all ranks are gathered, each takes its neighbours'; zeros at both ends.
    """
    extent = x.shape[dim]
    edges = torch.cat([x.narrow(dim, extent - before, before), x.narrow(dim, 0, after)], dim)
    gathered = gather(edges.unsqueeze(0), axis, size, 0, 1, True)
    ranks = torch.ones(size, size, dtype=torch.bool, device=x.device)
    parts = [x]
    if before:
        parts.insert(0, _part_of(gathered.narrow(dim + 1, 0, before), ranks.tril(-1).triu(-1), axis, size))
    if after:
        parts.append(_part_of(gathered.narrow(dim + 1, before, after), ranks.tril(1).triu(1), axis, size))
    return torch.cat(parts, dim)


def _part_of(gathered: Tensor, wanted: Tensor, axis: str, size: int) -> Tensor:
    """The part that row ``rank`` of ``wanted`` [ranks, ranks] marks; zeros where it marks none."""
    mine: Tensor = take_shard(wanted, axis, size, 0, 1)
    marked = mine.reshape([size] + [1] * (gathered.ndim - 1))
    return torch.where(marked, gathered, 0.0).sum(0)


def vocabulary_embedding(weight: Tensor, ids: Tensor, padding_idx: int, axis: str, size: int) -> Tensor:
    """Lookup in a table sharded along its rows; rows of other ranks give zero, so the result is Partial.

    padding_idx: global row that gets no gradient, -1 for none.
    """
    local: Tensor = shard_ids(ids, axis, size, weight.shape[0])
    rows = torch.nn.functional.embedding(local.clamp(min=0), weight)
    if padding_idx >= 0:
        rows = torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows * (local >= 0).unsqueeze(-1).to(rows.dtype)
