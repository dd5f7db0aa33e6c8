"""The smallest memory cap that some plan meets, found by searching under other caps."""

from __future__ import annotations

from collections.abc import Callable

from autopar.planner.search import Infeasible, Solution

TOLERANCE = 0.02


def smallest_cap(
    attempt: Callable[[int], Solution | Infeasible], too_small_bytes: int, likely_bytes: int
) -> tuple[int, Solution]:
    """A cap that a search met, with its plan, while one lower by ``TOLERANCE`` was tried in vain.

    attempt: searches under a cap; too_small_bytes: a cap that is known not to do; likely_bytes: one that may.
    Bounds are no help: what a plan needs is exact only once its program is rewritten, and searches do that.
    """
    low, high = too_small_bytes, max(likely_bytes, too_small_bytes + 1)
    while isinstance(best := attempt(high), Infeasible):
        low, high = high, high + max(1, high // 8)
    stride = TOLERANCE
    while high - low > max(1.0, TOLERANCE * high):
        probe = max(high - int(stride * high), (low + high) // 2)
        found = attempt(probe)
        if isinstance(found, Infeasible):
            low = probe
        else:
            best, high, stride = found, probe, 2 * stride
    return high, best
