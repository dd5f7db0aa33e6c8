"""Sums of squares of gradients: those of half types are beyond their range and precision."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**18
"""Elements of half types that are taken at once: on a CPU they are copied to float64."""


def sum_of_squares(row: Tensor) -> Tensor:
    """Of a flat tensor, as one float64."""
    if row.dtype not in (torch.float16, torch.bfloat16):
        norm: Tensor = torch.linalg.vector_norm(row)
        return norm.double().square()
    parts = (row[first : first + CHUNK] for first in range(0, row.numel(), CHUNK))
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum()
