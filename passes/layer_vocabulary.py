"""Layers of ours as they stand in traced graphs, with their gradients: attention, batch norm, experts, losses.

See ``passes.vocabulary``; what of them is split along a factor by an algorithm of its own is in
``passes.sharded_vocabulary``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from passes.vocabulary import Bits, Collect, all_gather, all_reduce, define, like

HALF = (torch.float16, torch.bfloat16)
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@define("cross_entropy_sum(Tensor logits, Tensor labels, int ignore_index, float label_smoothing) -> Tensor")
def _cross_entropy_sum(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    return logits.new_empty([], dtype=torch.float32 if logits.dtype in HALF else logits.dtype)


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
    return like(x)


@define(
    "experts_backward(Tensor grad, Tensor x, Tensor index, Tensor weights, Tensor gate_up, Tensor down, "
    "str activation, int total) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _experts_backward(
    grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like(x), like(weights), like(gate_up), like(down)


@define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale) -> (Tensor, Tensor)")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, logsumexp = CPU_ATTENTION(q, k, v, 0.0, is_causal, scale=scale)
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


EXPERTS, EXPERTS_BACKWARD = _experts, _experts_backward


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
        return EXPERTS(x, index, weights, gate_up, down, activation, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made = EXPERTS_BACKWARD(grads[0], *ctx.saved_tensors, *ctx.options)
        dx, dweights, dgate_up, ddown = made
        return dx, None, dweights, dgate_up, ddown, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Fused attention over [batch, heads, length, width]; the kernel is chosen by the device it runs on."""
    q, k, v = (with_rows(x) for x in (q, k, v))
    return _Attention.apply(q, k, v, mask, is_causal, scale)  # type: ignore[no-any-return,no-untyped-call]


def with_rows(x: Tensor) -> Tensor:
    """Its rows lie one number behind the other, which is what kernels of attention take for granted (torch's own choice
    of them, ``sdp_utils.h``, leaves others to products of matrices)."""
    return x if x.stride(-1) == 1 else x.contiguous()


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


def cross_entropy_sum(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    """Sum over rows of the cross entropy of logits [n, classes] against labels [n]; in float32 for half types."""
    reduction = "none" if logits.dtype in HALF else "sum"
    losses = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return losses.sum(dtype=torch.float32) if reduction == "none" else losses


DIFFERENTIABLE = {
    torch.ops.autopar.experts.default: experts,
    torch.ops.autopar.batch_norm.default: batch_norm,
    torch.ops.autopar.attention.default: attention,
    torch.ops.autopar.cross_entropy_sum.default: cross_entropy_sum,
    torch.ops.autopar.collect.default: Collect.apply,
    torch.ops.autopar.bits.default: Bits.apply,
}
"""Opaque ops of forward graphs -> the functions with a gradient that stand for them when the joint graph is traced."""
