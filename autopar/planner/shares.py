"""What a placement costs once ends of stages are moved: more of the model where it is soon done and summed."""

from __future__ import annotations

import numpy as np

from autopar.planner.placed_prices import Prices
from autopar.planner.places import FloatArray, IntArray


def moved_cost_s(prices: Prices, cells: IntArray, segments: int) -> float:
    """The price of one placement [stage, replica, shard] with stages of such shares of so many segments as cost least,
    as though segments could be divided; no more than that of stages that are equally long."""
    pp = prices.traffic.pp
    even_s = prices.cost_s(cells)
    if pp == 1:
        return even_s
    work_s, once_s = prices.whole_s(cells)
    tried = shares(work_s, once_s, pp / segments)
    replicas, groups = prices.parts_s(np.repeat(cells[None], len(tried), axis=0), tried)
    return min(even_s, float((replicas.max(axis=-1) + groups.max(axis=(-2, -1))).min()))


def shares(work_s: FloatArray, once_s: FloatArray, least: float) -> FloatArray:
    """[choice, stage] Times an equal part of the model that stages have, least or more, one of which minimizes

        max over stages of share x work_s + max over stages of share x once_s

    but for the least. Let the latter be r times the former, t. The largest shares are min(t / work_s, r t / once_s), of
    which the sum is the number of stages: t (1 + r) as a function of r is monotone between those r at which a stage
    has both minima, so one of these is best.
    """
    summed = once_s > 0
    if not summed.any():
        return _at_least(1 / work_s, least)[None]
    once = np.divide(1.0, once_s, out=np.full(len(once_s), np.inf), where=summed)
    most = np.minimum(1 / work_s, (once_s / work_s)[summed, None] * once)
    return np.stack([_at_least(own, least) for own in most])


def _at_least(sizes: FloatArray, least: float) -> FloatArray:
    """Shares in proportion to sizes, one on average, but for those that would be less than a least."""
    held = np.zeros(len(sizes), dtype=bool)
    while True:
        free = len(sizes) - least * held.sum()
        found: FloatArray = np.where(held, least, free * sizes / sizes[~held].sum())
        if not (under := found < least * (1 - 1e-9)).any():
            return found
        held |= under
