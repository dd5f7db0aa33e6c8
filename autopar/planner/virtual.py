"""Virtual stages: the segments that a search assigned to stages, cut again into a longer chain of smaller parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Assigned(Protocol):
    """Segments [first, last) with what each of them chose, in order."""

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...

    @property
    def assignments(self) -> tuple[Mapping[str, str], ...]: ...


class Timed(Assigned, Protocol):
    """The same with the seconds per microbatch of each segment."""

    @property
    def segments_s(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Part:
    """See ``Assigned``."""

    first: int
    last: int
    assignments: tuple[Mapping[str, str], ...] = field(hash=False)


def recut(stages: Sequence[Timed], count: int) -> tuple[Part, ...]:
    """The segments of all stages in ``count`` parts, the longest of which is as short as it can be."""
    assignments = [assignment for stage in stages for assignment in stage.assignments]
    ends = balanced_ends([seconds for stage in stages for seconds in stage.segments_s], count)
    return tuple(
        Part(first, last, tuple(assignments[first:last])) for first, last in zip((0, *ends), ends, strict=False)
    )


def balanced_ends(seconds: Sequence[float], count: int) -> tuple[int, ...]:
    """Where each of ``count`` neighbouring parts ends so that the longest is shortest; none is empty."""
    ends = shortest_ends(seconds, [1.0] * count, [len(seconds)] * count)
    assert ends is not None, (count, len(seconds))
    return ends


def shortest_ends(seconds: Sequence[float], slowness: Sequence[float], most: Sequence[int]) -> tuple[int, ...] | None:
    """Where neighbouring parts end so that the longest is shortest; none is empty. None where there is no way.

    slowness: of each part, by what its seconds are multiplied; most: of each part, how many it may have.
    worst[k][n]: the longest of k parts of the first n, with the place where the last of them begins.
    """
    sums = [0.0]
    for each in seconds:
        sums.append(sums[-1] + each)
    worst: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for slow, limit in zip(slowness, most, strict=True):
        row, before = {}, worst[-1]
        for last in range(len(worst), len(seconds) - (len(slowness) - len(worst)) + 1):
            cuts = [cut for cut in before if last - limit <= cut < last]
            if cuts:
                row[last] = min((max(before[cut][0], slow * (sums[last] - sums[cut])), cut) for cut in cuts)
        worst.append(row)
    if len(seconds) not in worst[-1]:
        return None
    ends = [len(seconds)]
    for row in reversed(worst[2:]):
        ends.append(row[ends[-1]][1])
    return tuple(reversed(ends))
