"""The smallest memory cap that some plan meets, found by searching under other caps."""

from __future__ import annotations

from collections.abc import Callable

from autopar.planner.solution import Infeasible, Solution

TOLERANCE = 0.005


def smallest_cap(
    attempt: Callable[[int], Solution | Infeasible],
    peak_bytes: Callable[[Solution], int],
    too_small_bytes: int,
    likely_bytes: int,
) -> tuple[int, Solution]:
    """A cap that a search met, with its plan, while one lower by at most ``TOLERANCE`` was tried in vain.

    attempt: searches under a cap; peak_bytes: what a plan needs; too_small_bytes: a cap that is known not to do;
    likely_bytes: one that may. Bounds are no help: what a plan needs is exact only once its program is rewritten, and
    searches do that. What the last one found, or was nearest to where it found none, is tried next.
    """
    low, high = too_small_bytes, max(likely_bytes, too_small_bytes + 1)
    while isinstance(best := attempt(high), Infeasible):
        step = max(1, high // 8)
        low, high = high, best.needed_bytes if high < best.needed_bytes <= high + step else high + step
    share = TOLERANCE  # the first guess is often the smallest: steps down from it begin small
    wanted = peak_bytes(best)
    while high - low > max(1.0, TOLERANCE * high):
        if low < wanted < high * (1 - TOLERANCE):
            lower = wanted
        else:
            lower, share = max((low + high) // 2, high - max(1, int(share * high))), 2 * share
        found = attempt(lower)
        if isinstance(found, Infeasible):
            low, wanted = lower, found.needed_bytes
        else:
            high, best, wanted = lower, found, peak_bytes(found)
    return high, best
