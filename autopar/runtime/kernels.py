"""Ops of ours whose kernel depends on the device a program runs on."""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Fused attention, q [b, h, t, d], k and v [b, h, s, d], additive mask: (out, logsumexp)."""
    if not q.is_cuda:
        out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
    elif mask is None and q.dtype in _HALF:
        result = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        out, logsumexp = result[0], result[1]
    else:
        result = _aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal, scale=scale)
        out, logsumexp = result[0], result[1]
    return out, logsumexp


def attention_backward(
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
    """Gradients of q, k and v."""
    if not q.is_cuda:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, logsumexp, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv
    random = torch.zeros(2, dtype=torch.int64, device=q.device)  # no dropout: never read
    if mask is None and q.dtype in _HALF:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, logsumexp, None, None, q.shape[2], k.shape[2], 0.0, is_causal, random, random,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    wanted = [True, True, True, False]
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, mask, out, logsumexp, random[0], random[1], 0.0, wanted, is_causal, scale=scale
    )
    return dq, dk, dv


def count_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """How many labels are not ignored, float32 scalar (exact below 2^24 labels, then rounded as float32 is)."""
    return (labels != ignore_index).sum().to(torch.float32)


def put(bucket: Tensor, grad: Tensor, offset: int) -> None:
    """Write a gradient, flattened, at an offset of a bucket."""
    bucket[offset : offset + grad.numel()].view(grad.shape).copy_(grad)
