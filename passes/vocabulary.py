"""Our ops as they stand in traced graphs: collectives, attention, losses.

Opaque library ops (namespace ``autopar``) have shapes but no kernels: tracing sees them as single calls, and
code generation prints each as a call of the runtime. On top of them, autograd functions pair every forward
collective with its dual, following the placements of ``cost_model.placement``:

copy <-> all_reduce, all_gather <-> reduce_scatter, take_shard <-> all_gather, all_to_all <-> all_to_all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_LIBRARY = torch.library.Library("autopar", "DEF")  # type: ignore[no-untyped-call]
_HALF = (torch.float16, torch.bfloat16)
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an opaque op and return a decorator for its shape function."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]

    def register(shape_function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"autopar::{name}", shape_function, lib=_LIBRARY)
        opaque: Callable[..., Any] = getattr(torch.ops.autopar, name).default
        return opaque

    return register


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _resized(x: Tensor, dim: int, extent: int) -> Tensor:
    return x.new_empty([extent if d == dim else s for d, s in enumerate(x.shape)])


@define("all_reduce(Tensor x, str axis, str op) -> Tensor")
def all_reduce(x: Tensor, axis: str, op: str) -> Tensor:
    return _like(x)


@define("all_gather(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def all_gather(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    return _resized(x, dim, x.shape[dim] * size)


@define("reduce_scatter(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def reduce_scatter(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    return _resized(x, dim, x.shape[dim] // size)


@define("take_shard(Tensor x, str axis, int size, int dim, int outer) -> Tensor")
def take_shard(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    return _resized(x, dim, x.shape[dim] // size)


@define("all_to_all(Tensor x, str axis, int size, int split_dim, int concat_dim) -> Tensor")
def all_to_all(x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
    split = _resized(x, split_dim, x.shape[split_dim] // size)
    return _resized(split, concat_dim, x.shape[concat_dim] * size)


@define("shard_ids(Tensor ids, str axis, int size, int extent) -> Tensor")
def shard_ids(ids: Tensor, axis: str, size: int, extent: int) -> Tensor:
    """ids less the first index of this rank's shard of ``extent`` rows; -1 where another rank holds the row."""
    return _like(ids)


@define("forward_end(Tensor x) -> Tensor")
def forward_end(x: Tensor) -> Tensor:
    """Marks where forward ends in a joint graph; removed by ``split``."""
    return x.new_empty([0])


@define("collect(Tensor x, int number) -> Tensor")
def collect(x: Tensor, number: int) -> Tensor:
    """x; a copy of it is handed to whoever runs the program, as output ``number`` of the model."""
    return _like(x)


@define("accumulate(Tensor grad, str parameter) -> ()")
def accumulate(grad: Tensor, parameter: str) -> None:
    """Adds a finished gradient to the parameter's buffer."""


@define("accumulate_product(Tensor left, Tensor right, str parameter) -> ()")
def accumulate_product(left: Tensor, right: Tensor, parameter: str) -> None:
    """Adds the product of two matrices, a finished gradient, to the parameter's buffer."""


@define("product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """The product of two matrices, and a bias for each column, by the library that the device is faster with."""
    return left.new_empty([left.shape[0], right.shape[1]])


@define("put(Tensor(a!) bucket, Tensor grad, int offset) -> ()")
def put(bucket: Tensor, grad: Tensor, offset: int) -> None:
    """Writes a finished gradient to its place in a bucket."""


@define("put_product(Tensor(a!) bucket, Tensor left, Tensor right, int offset) -> ()")
def put_product(bucket: Tensor, left: Tensor, right: Tensor, offset: int) -> None:
    """Writes the product of two matrices, a finished gradient, to its place in a bucket."""


@define("cross_entropy_sum(Tensor logits, Tensor labels, int ignore_index, float label_smoothing) -> Tensor")
def _cross_entropy_sum(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    return logits.new_empty([], dtype=torch.float32 if logits.dtype in _HALF else logits.dtype)


@define("count_labels(Tensor labels, int ignore_index) -> Tensor")
def count_labels(labels: Tensor, ignore_index: int) -> Tensor:
    return labels.new_empty([], dtype=torch.float32)


@define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, float momentum, "
    "float keep, float eps, int replicas) -> Tensor"
)
def _batch_norm(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


@define(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, str activation, int total) -> Tensor"
)
def _experts(x: Tensor, *rest: Any) -> Tensor:
    return _like(x)


@define(
    "experts_backward(Tensor grad, Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, "
    "str activation, int total) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _experts_backward(
    grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x), _like(weights), _like(gate_up), _like(down)


@define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale) -> (Tensor, Tensor)")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, logsumexp = _CPU_ATTENTION(q, k, v, 0.0, is_causal, scale=scale)
    return out, logsumexp


@define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor? mask, "
    "bool is_causal, float? scale) -> (Tensor, Tensor, Tensor)"
)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _CPU_ATTENTION_BACKWARD(grad, q, k, v, out, logsumexp, 0.0, is_causal, scale=scale)
    return dq, dk, dv


@define("attention_rows(Tensor q, Tensor k, Tensor v, float? scale, str axis, int size) -> (Tensor, Tensor)")
def _attention_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, axis: str, size: int
) -> tuple[Tensor, Tensor]:
    out, logsumexp = _CPU_ATTENTION(q, k, v, 0.0, False, scale=scale)
    return out, logsumexp


@define(
    "attention_rows_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, float? scale, "
    "str axis, int size) -> (Tensor, Tensor, Tensor)"
)
def _attention_rows_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


class _Copy(Function):
    """Replicate -> Varying."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Any:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.axis, "sum"), None


class _AllReduce(Function):
    """Partial -> Replicate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Any:
        return all_reduce(x, axis, "sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Gather(Function):
    """Shard -> Replicate (backward takes the shard) or Shard -> Varying (backward reduces and scatters)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, dim: int, outer: int, varying: bool) -> Any:
        ctx.place = (axis, size, dim, outer)
        ctx.varying = varying
        return all_gather(x, axis, size, dim, outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dual = reduce_scatter if ctx.varying else take_shard
        return dual(grads[0], *ctx.place), None, None, None, None, None


class _ReduceScatter(Function):
    """Partial -> Shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Any:
        ctx.place = (axis, size, dim, outer)
        return reduce_scatter(x, axis, size, dim, outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], *ctx.place), None, None, None, None


class _TakeShard(Function):
    """Replicate -> Shard."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Any:
        ctx.place = (axis, size, dim, outer)
        return take_shard(x, axis, size, dim, outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], *ctx.place), None, None, None, None


class _AllToAll(Function):
    """Shard(concat_dim) -> Shard(split_dim): the dim that was split is made whole, another is split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Any:
        ctx.place = (axis, size, concat_dim, split_dim)
        return all_to_all(x, axis, size, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_to_all(grads[0], *ctx.place), None, None, None, None


class _Collect(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Any:
        return collect(x, number)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Portion(Function):
    """Replicate -> Partial: each rank holds 1/size of the value; the gradient is the whole one on every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Any:
        return x / size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> Any:
        out, logsumexp = torch.ops.autopar.attention.default(q, k, v, mask, is_causal, scale)
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        ctx.flags = (is_causal, scale)
        ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, logsumexp, mask = ctx.saved_tensors
        dq, dk, dv = torch.ops.autopar.attention_backward.default(grads[0], q, k, v, out, logsumexp, mask, *ctx.flags)
        return dq, dk, dv, None, None, None


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


class _BatchNorm(Function):
    """Normalised by statistics of the samples of all replicas; the "gradient" of a running statistic is its new value.

    That is keep x old + momentum x own; where several calls change one statistic, they give the terms of a sum.
    Replicas exchange means and variances forward (one all_gather) and two sums backward (one all_reduce).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        keep: float,
        eps: float,
        replicas: int,
    ) -> Any:
        count = x.numel() // x.shape[1] * replicas
        if replicas == 1:
            out, mean, scale = torch.ops.aten.native_batch_norm.default(x, weight, bias, None, None, True, 0.0, eps)
            variance = scale.pow(-2) - eps
        else:
            variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
            parts = all_gather(torch.stack([mean, variance]).unsqueeze(0), "dp", replicas, 0, 1)
            means, variances = parts.unbind(1)
            mean = means.mean(0)
            variance = variances.mean(0) + (means - mean).square().mean(0)
            scale = (variance + eps).rsqrt()
            out = torch.ops.aten.native_batch_norm.default(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        new_mean = None if running_mean is None else keep * running_mean + momentum * mean
        unbiased = variance * (count / max(count - 1, 1))
        new_var = None if running_var is None else keep * running_var + momentum * unbiased
        ctx.save_for_backward(x, weight, mean, scale, new_mean, new_var)
        ctx.options = (bias is not None, eps, replicas, count)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, scale, new_mean, new_var = ctx.saved_tensors
        has_bias, eps, replicas, count = ctx.options
        if replicas == 1:
            wanted = [True, weight is not None, has_bias]
            given = (grads[0], x, weight, None, None, mean, scale, True, eps, wanted)
            dx, dw, db = torch.ops.aten.native_batch_norm_backward.default(*given)
        else:
            dims, along = [d for d in range(x.ndim) if d != 1], [1, -1, *[1] * (x.ndim - 2)]
            centred = x - mean.view(along)
            db = grads[0].sum(dims)
            product = (grads[0] * centred).sum(dims)
            dw = product * scale
            sums = all_reduce(torch.stack([db, product]), "dp", "sum") / count
            of_mean, of_scale = sums.unbind(0)
            factor = scale if weight is None else scale * weight
            shift = (of_scale * scale * scale).view(along)
            dx = (grads[0] - of_mean.view(along) - centred * shift) * factor.view(along)
        return dx, None if weight is None else dw, db if has_bias else None, new_mean, new_var, None, None, None, None


class _Experts(Function):
    """What is between the two products is computed again in backward: only the operands are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        activation: str,
        total: int,
    ) -> Any:
        ctx.save_for_backward(x, index, weights, gate_up, down)
        ctx.options = (activation, total)
        return torch.ops.autopar.experts.default(x, index, weights, gate_up, down, activation, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made = torch.ops.autopar.experts_backward.default(grads[0], *ctx.saved_tensors, *ctx.options)
        dx, dweights, dgate_up, ddown = made
        return dx, None, dweights, dgate_up, ddown, None, None


class _VocabularyCrossEntropy(Function):
    """Sum of cross entropies of logits sharded along the classes: two all_reduces of [n], the logits stay sharded."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, axis: str, size: int) -> Any:
        rows = logits.float() if logits.dtype in _HALF else logits
        largest = all_reduce(rows.amax(1), axis, "max")
        shifted = rows - largest.unsqueeze(1)
        ids = shard_ids(labels, axis, size, logits.shape[1])
        here = (ids >= 0).logical_and(labels != ignore_index)
        picked = shifted.gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1)
        exponentials = shifted.exp()
        partial = torch.stack([exponentials.sum(1), torch.where(here, picked, 0.0)])
        total, target = all_reduce(partial, axis, "sum").unbind(0)
        ctx.save_for_backward(exponentials, total, ids, here, labels)
        ctx.ignore_index, ctx.dtype = ignore_index, logits.dtype
        return torch.where(labels != ignore_index, total.log() - target, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        exponentials, total, ids, here, labels = ctx.saved_tensors
        weight = torch.where(labels != ctx.ignore_index, grads[0], 0.0)
        grad = exponentials * (weight / total).unsqueeze(1)
        subtract = torch.where(here, weight, 0.0).neg().unsqueeze(1)
        grad = grad.scatter_add(1, ids.clamp(min=0).unsqueeze(1), subtract)
        return grad.to(ctx.dtype), None, None, None, None


def copy(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Varying: nothing forward, all_reduce backward."""
    return _Copy.apply(x, axis)  # type: ignore[no-any-return,no-untyped-call]


def reduce(x: Tensor, axis: str) -> Tensor:
    """Partial -> Replicate: all_reduce forward, nothing backward."""
    return _AllReduce.apply(x, axis)  # type: ignore[no-any-return,no-untyped-call]


def gather(x: Tensor, axis: str, size: int, dim: int, outer: int, varying: bool) -> Tensor:
    """Shard -> Replicate or, with ``varying``, Shard -> Varying."""
    return _Gather.apply(x, axis, size, dim, outer, varying)  # type: ignore[no-any-return,no-untyped-call]


def scatter_sum(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    """Partial -> Shard."""
    return _ReduceScatter.apply(x, axis, size, dim, outer)  # type: ignore[no-any-return,no-untyped-call]


def shard(x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
    """Replicate -> Shard."""
    return _TakeShard.apply(x, axis, size, dim, outer)  # type: ignore[no-any-return,no-untyped-call]


def exchange(x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
    """Shard(concat_dim) -> Shard(split_dim), both plain."""
    return _AllToAll.apply(x, axis, size, split_dim, concat_dim)  # type: ignore[no-any-return,no-untyped-call]


def portion(x: Tensor, size: int) -> Tensor:
    """Replicate -> Partial."""
    return _Portion.apply(x, size)  # type: ignore[no-any-return,no-untyped-call]


def share(x: Tensor, size: int) -> Tensor:
    """Varying -> Partial: the plain product with 1/size, whose gradient is partial again."""
    return x * (1.0 / size)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Fused attention over [batch, heads, length, width]; the kernel is chosen by the device it runs on."""
    return _Attention.apply(q, k, v, mask, is_causal, scale)  # type: ignore[no-any-return,no-untyped-call]


def attention_rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None, axis: str, size: int) -> tuple[Tensor, Tensor]:
    """Causal attention of the queries that each rank of an axis holds, consecutive ones, to all keys before them."""
    return _AttentionRows.apply(q, k, v, scale, axis, size)  # type: ignore[no-any-return,no-untyped-call]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    keep: float,
    eps: float,
    replicas: int,
) -> Tensor:
    """Batch norm in training of x [n, c, ...]; running statistics are not written, see ``_BatchNorm``."""
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, keep, eps, replicas)  # type: ignore[no-any-return,no-untyped-call]


def experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str, total: int
) -> Tensor:
    """Gated experts: sum over j of weights[t, j] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])), e = index[t, j].

    x [t, h], index and weights [t, k], gate_up [e, 2 i, h], down [e, h, i]; total: experts of all ranks.
    An index of -1 names an expert of another rank and adds nothing.
    """
    return _Experts.apply(x, index, weights, gate_up, down, activation, total)  # type: ignore[no-any-return,no-untyped-call]


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


def cross_entropy_sum(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    """Sum over rows of the cross entropy of logits [n, classes] against labels [n]; in float32 for half types."""
    reduction = "none" if logits.dtype in _HALF else "sum"
    losses = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return losses.sum(dtype=torch.float32) if reduction == "none" else losses


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


DIFFERENTIABLE = {
    torch.ops.autopar.experts.default: experts,
    torch.ops.autopar.batch_norm.default: batch_norm,
    torch.ops.autopar.attention.default: attention,
    torch.ops.autopar.cross_entropy_sum.default: cross_entropy_sum,
    torch.ops.autopar.collect.default: _Collect.apply,
}
"""Opaque ops of forward graphs -> the functions with a gradient that stand for them when the joint graph is traced."""
