"""Adaptive softmax: while a model is traced, each row meets every cluster of classes, and its own counts.

torch picks the rows of each cluster, as many as there are, and programs are of fixed shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.adaptive import _ASMoutput


@contextmanager
def clusters_of_all_rows() -> Iterator[None]:
    with mock.patch.object(nn.AdaptiveLogSoftmaxWithLoss, "forward", _forward):
        yield


def _forward(module: nn.AdaptiveLogSoftmaxWithLoss, input_: Tensor, target_: Tensor) -> _ASMoutput:
    """(log probabilities of the labels, their mean loss) of rows [n, width], or of one row."""
    if not target_.dim():
        output, loss = _forward(module, input_.unsqueeze(0), target_.unsqueeze(0))
        return _ASMoutput(output.squeeze(0), loss)
    bounds = list(zip(module.cutoffs, module.cutoffs[1:], strict=False))
    inside = [(target_ >= low) & (target_ < high) for low, high in bounds]
    places = target_
    for number, own in enumerate(inside):
        places = torch.where(own, module.shortlist_size + number, places)
    output = _picked(module.head(input_), places)
    for tail, (low, high), own in zip(module.tail, bounds, inside, strict=True):
        likely = _picked(tail(input_), (target_ - low).clamp(0, high - low - 1))
        output = output + torch.where(own, likely, 0.0)
    return _ASMoutput(output, (-output).mean())


def _picked(logits: Tensor, places: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, places.unsqueeze(1)).squeeze(1)
