"""Covariances: ``torch.cov`` and ``torch.corrcoef``, while a model is traced, as the sums that they are.

torch asks how many observations there are as a tensor's value, which no trace can answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def covariances_as_sums() -> Iterator[None]:
    with ExitStack() as stack:
        for name, instead in (("cov", _cov), ("corrcoef", _corrcoef)):
            for owner in (torch, Tensor):
                stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def _cov(
    input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """Of rows, whose columns are observations; fweights: how often each was made, aweights: how much it counts."""
    x = input if input.dim() > 1 else input.reshape(1, -1)
    x = x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
    given = [w.to(x.real.dtype) for w in (fweights, aweights) if w is not None]
    if not given:
        centred = x - x.mean(1, keepdim=True)
        return (centred @ centred.mH).squeeze() / max(x.shape[1] - correction, 0)
    weights = torch.stack(given).prod(0)
    total = weights.sum()
    lost = (weights * given[-1]).sum() / total if aweights is not None else 1.0
    centred = x - (x * weights).sum(1, keepdim=True) / total
    return ((centred * weights) @ centred.mH).squeeze() / (total - correction * lost).clamp(min=0)


def _corrcoef(input: Tensor) -> Tensor:
    found = _cov(input)
    if not found.dim():
        return found / found
    spread = found.diag().real.sqrt()
    scaled = found / spread.unsqueeze(1) / spread
    if not scaled.is_complex():
        return scaled.clamp(-1, 1)
    return torch.complex(scaled.real.clamp(-1, 1), scaled.imag.clamp(-1, 1))
