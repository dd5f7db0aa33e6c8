"""The smallest memory cap that some plan meets, found by searching under other caps."""

from __future__ import annotations

from collections.abc import Callable

from autopar.planner.solution import Infeasible, Solution

TOLERANCE = 0.005


def smallest_cap(
    attempt: Callable[[int], Solution | Infeasible], too_small_bytes: int, likely_bytes: int
) -> tuple[int, Solution]:
    """A cap that a search met, with its plan, while one lower by at most ``TOLERANCE`` was tried in vain.

    attempt: searches under a cap; too_small_bytes: a cap that is known not to do; likely_bytes: one that may.
    Bounds are no help: what a plan needs is exact only once its program is rewritten, and searches do that.
    """
    low, high = too_small_bytes, max(likely_bytes, too_small_bytes + 1)
    while isinstance(best := attempt(high), Infeasible):
        low, high = high, high + max(1, high // 8)
    step = TOLERANCE  # the first guess is often the smallest: steps down from it begin small
    while high - low > max(1.0, TOLERANCE * high):
        lower = max((low + high) // 2, high - max(1, int(step * high)))
        found = attempt(lower)
        if isinstance(found, Infeasible):
            low = lower
        else:
            high, best, step = lower, found, 2 * step
    return high, best
