"""The loss over all alignments of labels with steps (CTC) as it stands in traced graphs, one number a sample.

torch's own reads lengths as numbers, which no trace holds, and adds samples up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function

from passes.layer_vocabulary import DIFFERENTIABLE
from passes.vocabulary import define, like

_MEAN, _SUM = 1, 2
"""Reductions, as torch numbers them."""


@define("ctc(Tensor likely, Tensor labels, Tensor steps, Tensor lengths, int blank, bool zero_infinity) -> Tensor")
def _ctc(likely: Tensor, *rest: Any) -> Tensor:
    return likely.new_empty(likely.shape[1])


@define(
    "ctc_backward(Tensor grad, Tensor likely, Tensor labels, Tensor steps, Tensor lengths, int blank, "
    "bool zero_infinity) -> Tensor"
)
def _ctc_backward(grad: Tensor, likely: Tensor, *rest: Any) -> Tensor:
    return like(likely)


CTC, CTC_BACKWARD = _ctc, _ctc_backward


class _Ctc(Function):
    """What is likely up to each step is computed again in backward: only the operands are kept."""

    @staticmethod
    def forward(
        ctx: Any, likely: Tensor, labels: Tensor, steps: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
    ) -> Any:
        ctx.save_for_backward(likely, labels, steps, lengths)
        ctx.options = (blank, zero_infinity)
        return CTC(likely, labels, steps, lengths, blank, zero_infinity)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return CTC_BACKWARD(grads[0], *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def ctc(likely: Tensor, labels: Tensor, steps: Tensor, lengths: Tensor, blank: int, zero_infinity: bool) -> Tensor:
    """Losses [b] of logarithms [t, b, c] against the first ``lengths`` [b] of labels [b, s], over ``steps`` [b].

    zero_infinity: what no alignment reaches costs nothing. In a trace labels may be [n], those of all samples.
    """
    return _Ctc.apply(likely, labels, steps, lengths, blank, zero_infinity)  # type: ignore[no-any-return,no-untyped-call]


DIFFERENTIABLE[torch.ops.autopar.ctc.default] = ctc


@contextmanager
def alignments_of_samples() -> Iterator[None]:
    """Meanwhile ``torch.ctc_loss`` is ours and what is made of it, where labels are in rows, or picked by a mask."""
    plain = torch.ctc_loss

    def stated(
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor | Sequence[int],
        target_lengths: Tensor | Sequence[int],
        blank: int = 0,
        reduction: int = _MEAN,
        zero_infinity: bool = False,
    ) -> Tensor:
        given = _as_autocast(log_probs.unsqueeze(1) if log_probs.dim() == 2 else log_probs)
        samples = given.shape[1]
        labels = targets.unsqueeze(0) if targets.dim() == 1 and samples == 1 else targets
        if labels.dim() == 1 and not isinstance(labels.shape[0], torch.SymInt):
            return plain(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)  # type: ignore[arg-type]
        steps, lengths = (_numbers(value, samples) for value in (input_lengths, target_lengths))
        each: Tensor = torch.ops.autopar.ctc.default(given, labels, steps, lengths, blank, zero_infinity)
        if reduction == _MEAN:
            return (each / lengths.clamp(min=1)).mean()
        return each.sum() if reduction == _SUM else each.view(log_probs.shape[1:-1])

    with mock.patch.object(torch, "ctc_loss", stated):
        yield


def _as_autocast(likely: Tensor) -> Tensor:
    """What torch's own loss gets in regions of ``torch.autocast``: half types in float32."""
    is_half = likely.dtype in (torch.float16, torch.bfloat16)
    return likely.float() if is_half and torch.is_autocast_enabled(likely.device.type) else likely


def _numbers(lengths: Tensor | Sequence[int], samples: int) -> Tensor:
    given = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths))
    return given.reshape(samples)
