"""Ops of ours whose kernel depends on the device a program runs on."""

from __future__ import annotations

import torch
from torch import Tensor

from autopar.runtime.draws import drop, keep, normal, random_integers, random_keys, uniform

__all__ = [
    "attention",
    "attention_backward",
    "attention_rows",
    "attention_rows_backward",
    "by_rows",
    "class_gradients",
    "class_shares",
    "count_labels",
    "ctc",
    "ctc_backward",
    "drop",
    "experts",
    "experts_backward",
    "keep",
    "normal",
    "product",
    "put",
    "random_integers",
    "random_keys",
    "uniform",
]

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


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


def attention_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, index: int, size: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of part ``index`` of ``size`` consecutive parts of the queries, k and v [b, h, size x t, d].

    All keys before the part, then its own: the two results are averaged by their sums of exponentials.
    """
    own, before = _own_and_before(index, q.shape[2])
    out, logsumexp = attention(q, k[:, :, own], v[:, :, own], None, True, scale)
    if index == 0:
        return out, logsumexp
    earlier, earlier_sum = attention(q, k[:, :, before], v[:, :, before], None, False, scale)
    total = torch.logaddexp(logsumexp, earlier_sum)
    out.mul_(_share(logsumexp, total, out)).add_(earlier.mul_(_share(earlier_sum, total, out)))
    return out, total


def attention_rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float | None,
    index: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; of the latter this rank's part, zero at later keys."""
    own, before = _own_and_before(index, q.shape[2])
    dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for keys, is_causal in ((own, True), (before, False)):
        if keys.stop > keys.start:
            parts = attention_backward(grad, q, k[:, :, keys], v[:, :, keys], out, logsumexp, None, is_causal, scale)
            dq.add_(parts[0])
            dk[:, :, keys] = parts[1]
            dv[:, :, keys] = parts[2]
    return dq, dk, dv


def class_shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows of logits [n, classes], in float32 for half types; the logarithm [n] of what it divides by."""
    shares = torch.softmax(logits, 1, dtype=torch.float32 if logits.dtype in _HALF else None)
    largest = logits.amax(1).to(shares.dtype)
    return shares, torch.where(largest.isneginf(), largest, largest - shares.amax(1).log())


def class_gradients(shares: Tensor, factor: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """factor x shares, less weight at ids (-1: nowhere), by rows: shares [n, classes], the others [n].

    Rows of factor 0 are 0, even where no share is a number: all their classes are masked.
    """
    grad, nothing = torch.empty_like(shares, dtype=dtype), factor == 0
    torch.mul(shares, factor.unsqueeze(1), out=grad)
    if grad.is_cuda or nothing.any():  # a CUDA device is not waited for
        grad.masked_fill_(nothing.unsqueeze(1), 0.0)
    at = ids.clamp(min=0).unsqueeze(1)
    kept = torch.where(nothing, 0.0, shares.gather(1, at).squeeze(1) * factor)
    return grad.scatter_(1, at, (kept - torch.where(ids >= 0, weight, 0.0)).to(dtype).unsqueeze(1))


def _own_and_before(index: int, length: int) -> tuple[slice, slice]:
    return slice(index * length, (index + 1) * length), slice(0, index * length)


def _share(logsumexp: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """Of the sum of exponentials, [b, h, t, 1]; kernels may pad the rows."""
    return (logsumexp - total).exp()[:, :, : out.shape[2]].unsqueeze(-1).to(out.dtype)


def count_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """How many labels are not ignored, float32 scalar (exact below 2^24 labels, then rounded as float32 is)."""
    return (labels != ignore_index).sum().to(torch.float32)


def product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN, as torch.compile has it multiply; the rows of ``left`` lie one behind the other."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return made


def by_rows(matrix: Tensor) -> Tensor:
    """A copy of a matrix that lies transposed, row after row."""
    return matrix.contiguous()


def put(bucket: Tensor, grad: Tensor, offset: int) -> None:
    """Write a gradient, flattened, at an offset of a bucket."""
    bucket[offset : offset + grad.numel()].view(grad.shape).copy_(grad)


def put_product(bucket: Tensor, left: Tensor, right: Tensor, offset: int) -> None:
    """Write the product of two matrices at an offset of a bucket."""
    rows, columns = left.shape[0], right.shape[1]
    torch.mm(left, right, out=bucket[offset : offset + rows * columns].view(rows, columns))


def experts(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str, total: int
) -> Tensor:
    """Gated experts (see ``passes.layer_vocabulary.experts``): one pair of products for each expert that has tokens."""
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for expert in range(gate_up.shape[0]):
        tokens, places = torch.where(index == expert)
        if len(tokens):
            share = weights[tokens, places].unsqueeze(1)
            out.index_add_(0, tokens, _expert(x[tokens], gate_up[expert], down[expert], activation).mul_(share))
    return out


def _expert(taken: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    gate, up = torch.mm(taken, gate_up.t()).chunk(2, 1)
    return torch.mm(_activated(gate, activation).mul_(up), down.t())


def experts_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    total: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down."""
    made = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, weights, gate_up, down))
    dx, dweights, dgate_up, ddown = made
    for expert in range(gate_up.shape[0]):
        tokens, places = torch.where(index == expert)
        if not len(tokens):
            continue
        share, into = weights[tokens, places].unsqueeze(1), (dgate_up[expert], ddown[expert])
        held = gate_up[expert], down[expert]
        above, dshare = _expert_backward(grad[tokens], x[tokens], share, held, into, activation)
        dweights[tokens, places] = dshare
        dx.index_add_(0, tokens, above)
        del above  # before the next expert's
    return dx, dweights, dgate_up, ddown


def _expert_backward(
    grad: Tensor,
    taken: Tensor,
    share: Tensor,
    held: tuple[Tensor, Tensor],
    into: tuple[Tensor, Tensor],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of its tokens and their shares, those of its weights written into others. What is not needed any
    more is let go: with few experts the values within one are what a step holds most of."""
    gate, up = torch.mm(taken, held[0].t()).chunk(2, 1)
    active = _activated(gate, activation)
    inner, dinner = active * up, torch.mm(grad, held[1])
    dshare = (dinner * inner).sum(1)
    torch.mm((grad * share).t(), inner, out=into[1])
    del inner
    dinner.mul_(share)
    dgate = _activation_gradient(up.mul_(dinner), gate, active, activation)
    dboth = torch.cat([dgate, dinner.mul_(active)], 1)
    del gate, up, active, dinner, dgate
    torch.mm(dboth.t(), taken, out=into[0])
    return torch.mm(dboth, held[0]), dshare


def _activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    if activation == "relu":
        return torch.relu(gate)
    return torch.nn.functional.gelu(gate, approximate=_GELU[activation])


def _activation_gradient(grad: Tensor, gate: Tensor, active: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        made: Tensor = _aten.silu_backward(grad, gate)
    elif activation == "relu":
        made = _aten.threshold_backward(grad, active, 0)
    else:
        made = _aten.gelu_backward(grad, gate, approximate=_GELU[activation])
    return made


def ctc(likely: Tensor, labels: Tensor, steps: Tensor, lengths: Tensor, blank: int, zero_infinity: bool) -> Tensor:
    """Losses of samples over all alignments (see ``passes.alignment_vocabulary.ctc``)."""
    loss: Tensor = _aten._ctc_loss.Tensor(likely, labels, steps, lengths, blank, zero_infinity)[0]
    return loss.masked_fill_(loss.isinf(), 0.0) if zero_infinity else loss


def ctc_backward(
    grad: Tensor, likely: Tensor, labels: Tensor, steps: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
) -> Tensor:
    """Gradient of ``likely``."""
    given = (likely, labels, steps, lengths)
    loss, before = _aten._ctc_loss.Tensor(*given, blank, zero_infinity)
    made: Tensor = _aten._ctc_loss_backward.Tensor(grad, *given, loss, before, blank, zero_infinity)
    return made
