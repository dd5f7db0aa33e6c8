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
from typing import Protocol

from cost_model.device_rows import is_small_product
from cost_model.program import Block, Instruction, OpCost

_MULTIPLIED = ("matmul", "convolution", "convolution_backward")
"""Kinds of the library that multiplies large matrices."""
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ColdCalls:
    """Seconds that a call takes longer than one right behind another of the same op.

    op, view, product: (seconds since that call, seconds longer), the first growing; straight between points in the
    logarithm of the first, nothing below the first point, and no more than at the last. product: of large products
    and convolutions. overhead_s: of the calls that ``op`` was measured with.

    An op whose overhead is another brings back as much code as the square root of it says: one that calls many others
    runs most of that code for each. Measured behind two products of 512 on two cores of an EPYC 9004 that others
    shared, (overhead, longer) in microseconds: addition 3, 66; softmax 6, 65; layer norm 10, 81; lookup 9, 164; binary
    cross entropy 16, 173; a mask of dropout, of 25 calls, 119 and 8 times an addition's.
    """

    op: Points
    view: Points
    product: Points
    overhead_s: float

    def __post_init__(self) -> None:
        assert self.overhead_s > 0
        for points in (self.op, self.view, self.product):
            assert points and all(a[0] < b[0] for a, b in zip(points, points[1:], strict=False))

    def longer_s(self, since_s: float, cost: OpCost | None, overhead_s: float) -> float:
        """Of one call, so long after the last of its op; no cost: of a view. overhead_s: of the op."""
        if cost is None:
            return _at(self.view, since_s)
        if cost.kind in _MULTIPLIED and not is_small_product(cost):
            return _at(self.product, since_s)
        return _at(self.op, since_s) * math.sqrt(overhead_s / self.overhead_s)

    def faster(self, factor: float) -> ColdCalls:
        """Those of a device that does everything in 1 / factor of the time."""

        def sooner(points: Points) -> Points:
            return tuple((x / factor, y / factor) for x, y in points)

        return ColdCalls(sooner(self.op), sooner(self.view), sooner(self.product), self.overhead_s / factor)


class Cooled(Protocol):
    """A device of which it may be known."""

    @property
    def cold_calls(self) -> ColdCalls | None: ...

    def call_overhead_s(self, cost: OpCost, /) -> float: ...


def _at(points: Points, since_s: float) -> float:
    right = bisect.bisect_right(points, since_s, key=lambda point: point[0])
    if right in (0, len(points)):
        return points[-1][1] if right else 0.0
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * math.log(since_s / x0) / math.log(x1 / x0)


def cold_seconds(
    blocks: Sequence[Block], spent_s: Sequence[Sequence[float]], between_s: float, devices: Sequence[Cooled]
) -> Iterator[list[float]]:
    """What each instruction of each block takes longer than a call in a row, on the slowest of the devices.

    The blocks run one behind the other, over and over; spent_s: on each of their instructions; between_s: from the end
    of the last to the beginning of the first.
    """
    since_s = _since_last(blocks, spent_s, between_s)
    for block in blocks:
        yield [
            max(_longer_s(device, seconds, instruction.cost) for device in devices)
            for instruction, seconds in zip(block.instructions, since_s, strict=False)
        ]


def _longer_s(device: Cooled, since_s: float, cost: OpCost | None) -> float:
    assert device.cold_calls is not None
    return device.cold_calls.longer_s(since_s, cost, 0.0 if cost is None else device.call_overhead_s(cost))


def _code(instruction: Instruction) -> str:
    """What an instruction runs: its op, of which all small products share what multiplies."""
    cost = instruction.cost
    return "product" if cost is not None and is_small_product(cost) else instruction.op


def _since_last(blocks: Sequence[Block], spent_s: Sequence[Sequence[float]], between_s: float) -> Iterator[float]:
    """For each instruction, seconds since its op ran last."""
    ops = [_code(instruction) for block in blocks for instruction in block.instructions]
    taken = list(itertools.chain(*spent_s))
    ends = list(itertools.accumulate(taken))
    round_s = between_s + (ends[-1] if ends else 0.0)
    last = {op: end - round_s for op, end in zip(ops, ends, strict=True)}
    for op, seconds, end in zip(ops, taken, ends, strict=True):
        yield end - seconds - last[op]
        last[op] = end
