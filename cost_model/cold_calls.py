"""Calls whose code has left the caches: what they take longer, by how long others ran since.

A program is straight-line code: between two calls of one op stand others, which push its code out of the processor's
caches, as do those who share them. Ops that are timed in a row of their own never meet that. The time in between
tells it better than the bytes that were moved meanwhile: products, which read theirs several times, push out more.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cost_model.program import Block

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ColdCalls:
    """Seconds that a call takes longer than one right behind another of the same op.

    op, view: (seconds since that call, seconds longer), the first growing; straight between points in the logarithm of
    the first, nothing below the first point, and no more than at the last.
    """

    op: Points
    view: Points

    def __post_init__(self) -> None:
        for points in (self.op, self.view):
            assert points and all(a[0] < b[0] for a, b in zip(points, points[1:], strict=False))

    def longer_s(self, since_s: float, *, is_view: bool) -> float:
        """Of one call, so long after the last of its op."""
        points = self.view if is_view else self.op
        right = bisect.bisect_right(points, since_s, key=lambda point: point[0])
        if right in (0, len(points)):
            return points[-1][1] if right else 0.0
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 + (y1 - y0) * math.log(since_s / x0) / math.log(x1 / x0)

    def faster(self, factor: float) -> ColdCalls:
        """Those of a device that does everything in 1 / factor of the time."""
        op, view = (tuple((x / factor, y / factor) for x, y in points) for points in (self.op, self.view))
        return ColdCalls(op, view)


def cold_seconds(
    blocks: Sequence[Block], spent_s: Sequence[Sequence[float]], between_s: float, devices: Sequence[ColdCalls]
) -> Iterator[list[float]]:
    """What each instruction of each block takes longer than a call in a row, on the slowest of the devices.

    The blocks run one behind the other, over and over; spent_s: on each of their instructions; between_s: from the end
    of the last to the beginning of the first.
    """
    since_s = _since_last(blocks, spent_s, between_s)
    for block in blocks:
        yield [
            max(device.longer_s(seconds, is_view=instruction.cost is None) for device in devices)
            for instruction, seconds in zip(block.instructions, since_s, strict=False)
        ]


def _since_last(blocks: Sequence[Block], spent_s: Sequence[Sequence[float]], between_s: float) -> Iterator[float]:
    """For each instruction, seconds since its op ran last."""
    ops = [instruction.op for block in blocks for instruction in block.instructions]
    taken = list(itertools.chain(*spent_s))
    ends = list(itertools.accumulate(taken))
    round_s = between_s + (ends[-1] if ends else 0.0)
    last = {op: end - round_s for op, end in zip(ops, ends, strict=True)}
    for op, seconds, end in zip(ops, taken, ends, strict=True):
        yield end - seconds - last[op]
        last[op] = end
