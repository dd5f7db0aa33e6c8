"""The probes of ops along a row that no other of their kind tells: sorting, the largest few, running sums, variances.

They take 10 to 60 times as long as sums over as many bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from autopar.calibrate_operands import WIDTH, Made, Tensor, drawn
from autopar.calibrate_streams import STREAM_BYTES, TINY_BYTES
from autopar.calibrate_worker import ALONE, Probe

aten = torch.ops.aten

_LARGEST = 2
"""Of each row, as of experts."""


def order_probes() -> Iterator[Probe]:
    """Each op at each size; the smallest tells its overhead."""
    for made in (_sort, _largest, _running_sum, _variance):
        for nbytes in (TINY_BYTES, *STREAM_BYTES[1:5:2]):
            label = f"{made.__name__.strip('_').replace('_', ' ')}, {nbytes / 2**10:,.0f} KiB"
            yield Probe(ALONE, label, functools.partial(made, nbytes))


def _rows(nbytes: int) -> Tensor:
    numel = nbytes // 4
    return drawn(numel // min(WIDTH, numel), min(WIDTH, numel))


def _sort(nbytes: int) -> Made:
    return aten.sort.default, (_rows(nbytes // 4), -1), {}  # with places of 8 bytes beside


def _largest(nbytes: int) -> Made:
    return aten.topk.default, (_rows(nbytes), _LARGEST, -1), {}


def _running_sum(nbytes: int) -> Made:
    return aten.cumsum.default, (_rows(nbytes // 2), -1), {}


def _variance(nbytes: int) -> Made:
    return aten.var_mean.correction, (_rows(nbytes), [-1]), {"correction": 0, "keepdim": True}
