"""Shares of the model that stages have: times an equal part of it, [placement, stage], one on average."""

from __future__ import annotations

import numpy as np

from autopar.planner.places import FloatArray

TINY = 1e-30
"""Seconds that are none."""


def equally_long(work_s: FloatArray, least: float) -> FloatArray:
    """Of stages that take so long for an equal part, but for shares that would be less than a least."""
    return at_least(np.divide(1.0, work_s, out=np.ones_like(work_s), where=work_s > 0), least)


def soonest(work_s: FloatArray, once_s: FloatArray, least: float) -> FloatArray:
    """Those that minimize

        max over stages of share x work_s + max over stages of share x once_s

    but for a least. Let the latter be r times the former, t. The largest shares are min(t / work_s, r t / once_s), of
    which the sum is the number of stages: t (1 + r) as a function of r is monotone between those r at which a stage
    has both minima, so one of these is best.
    """
    work, once = 1.0 / np.maximum(work_s, TINY), 1.0 / np.maximum(once_s, TINY)
    ratios = once_s * work
    most = np.minimum(work[:, None], ratios[..., None] * once[:, None])
    steps_s = np.divide(1 + ratios, most.sum(axis=-1), out=np.full_like(ratios, np.inf), where=ratios > 0)
    best = most[np.arange(len(most)), steps_s.argmin(axis=-1)]
    return at_least(np.where((ratios > 0).any(axis=-1, keepdims=True), best, work), least)


def at_least(sizes: FloatArray, least: float) -> FloatArray:
    """Shares in proportion to sizes, but for those that would be less than a least."""
    count, held = sizes.shape[-1], np.zeros(sizes.shape, dtype=bool)
    while True:
        free = count - least * held.sum(axis=-1, keepdims=True)
        total = np.where(held, 0.0, sizes).sum(axis=-1, keepdims=True)
        found: FloatArray = np.where(held, least, free * sizes / np.where(total > 0, total, 1.0))
        if not (under := found < least * (1 - 1e-9)).any():
            return found
        held |= under
