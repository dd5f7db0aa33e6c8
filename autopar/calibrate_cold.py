"""How much longer calls take whose code has left the caches: behind a product whose operands took its place."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Sequence

import torch

from autopar.calibrate_operands import drawn
from autopar.calibrate_streams import TINY_BYTES, stream_probes
from autopar.calibrate_worker import Call, Cold
from autopar.runtime import kernels
from cost_model.device import BLAS

aten = torch.ops.aten

COLD_PRODUCTS = ((256, 1), (384, 1), (512, 1), (512, 2), (512, 4))
"""What stands between calls: (extent, number) of square products."""
COLD_KINDS = ("elementwise", "transcendental", "softmax", "norm", "reduction", "copy")
"""Of the ops that are called: one of each."""
_SMALL = 16
"""Extent of a product of which nothing but its call is left."""
_ROUNDS = (9, 40)
"""The least and the most."""


def products_size(extent: int, number: int) -> float:
    """What the time of such products is in proportion to."""
    return float(number * extent**3)


def cold_s(library: str, products: tuple[int, int], budget_s: float) -> Cold:
    """Seconds of such products, and by which (an op, a view, a product) takes longer behind them than in a row; means
    of several ops and views.

    Views and ops stand in turn, as in programs: what one brings back into the caches, the next finds there.
    """
    calls = [*itertools.chain(*zip(_views(), _ops(), strict=True)), some_products(library, _SMALL, 1)]
    between = some_products(library, *products)
    alone, (between_s, *behind) = _seconds(calls, budget_s), _seconds([between, *calls], budget_s)
    longer = [max(0.0, cold - warm) for cold, warm in zip(behind, alone, strict=True)]
    *others, product_s = longer
    return between_s, statistics.fmean(others[1::2]), statistics.fmean(others[::2]), product_s


def _seconds(calls: Sequence[Call], budget_s: float) -> list[float]:
    """CPU time of each call, the median of rounds of all: others who take turns on the core are no part of it."""
    least, most = _ROUNDS
    samples: list[list[float]] = [[] for _ in calls]
    deadline = time.monotonic() + budget_s
    while len(samples[0]) < least or (len(samples[0]) < most and time.monotonic() < deadline):
        for call, taken in zip(calls, samples, strict=True):
            start = time.thread_time()
            call()
            taken.append(time.thread_time() - start)
    return [statistics.median(taken) for taken in samples]


def _ops() -> list[Call]:
    """The first op of each kind, on tensors so small that only its overhead is left."""
    tiny = [probe for probe in stream_probes() if probe.label.endswith(f", {TINY_BYTES / 2**10:,.0f} KiB")]
    return [next(probe for probe in tiny if probe.row == kind).call() for kind in COLD_KINDS]


def _views() -> list[Call]:
    """As many, no two alike."""
    matrix, row = drawn(16, 16), drawn(1, 16)
    calls = (
        (aten.view.default, matrix, [256]),
        (aten.transpose.int, matrix, 0, 1),
        (aten.expand.default, row, [16, 16]),
        (aten.slice.Tensor, matrix, 0, 0, 8),
        (aten.unsqueeze.default, matrix, 0),
        (aten.permute.default, matrix, [1, 0]),
    )
    return [functools.partial(op, *args) for op, *args in calls]


def some_products(library: str, extent: int, number: int) -> Call:
    """On other operands each time, as layers have weights of their own."""

    def call() -> None:
        for _ in range(number):
            left, right = drawn(extent, extent), drawn(extent, extent)
            _ = torch.mm(left, right) if library == BLAS else kernels.product(left, right, None)

    return call
