"""How long gloo's all_reduce takes: segments around a ring, of which none moves before its receiver has asked for it.

gloo/allreduce.cc: first every rank reduces its part of the tensor, then parts are gathered. A part is cut into segments
of at most a MiB, at least two. A rank has two of them under way; it asks for the next one when it has received and
added the one before last. Between two ranks it asks on the connection that it sends on, behind what it is sending:
where a segment takes longer than a message's delay, every segment waits for that delay once. At 200 Mbit/s and 5 ms
that makes 203 ms of 182, segment by segment as packets showed it. More ranks ask one neighbour while they send to the
other, whose packets do not hold those of another connection up for long.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from cost_model.collectives import Link, ring_s

_SEGMENT_BYTES = 1 << 20  # gloo::AllreduceOptions::kMaxSegmentSize
_ELEMENT_BYTES = 8  # the largest that is reduced: one element lies in one segment, which alone goes round
_FOLLOWED = 16  # segments; what further ones take is what the last of these took

_Row = npt.NDArray[np.float64]


def segments(nbytes: float, ranks: int) -> int:
    """Into so many each rank's part is cut."""
    return max(2, -int(-nbytes // (_SEGMENT_BYTES * ranks)))


@functools.lru_cache(maxsize=4096)
def all_reduce_s(links: tuple[Link, ...], asking_s: tuple[float, ...], nbytes: float) -> float:
    """links[i]: from rank i to the next, to which it sends; asking_s[i]: the delay of a message the other way."""
    ranks = len(links)
    if nbytes <= _ELEMENT_BYTES:
        return ring_s(links, 0.0, 2 * (ranks - 1))
    each = segments(nbytes, ranks)
    alike = len(set(links)) == len(set(asking_s)) == 1
    rows = list(zip(links, asking_s, strict=True))[: 1 if alike else None]
    ring = _Ring(
        busy_s=np.array([nbytes / (each * ranks) / link.bandwidth_bytes_per_s for link, _ in rows]),
        latency_s=np.array([link.latency_s for link, _ in rows]),
        asking_s=np.array([seconds for _, seconds in rows]),
        behind=ranks == 2,
    )
    entered_s = np.zeros(len(rows))
    for _ in range(2):
        entered_s = ring.around_s(entered_s, each * (ranks - 1))
    return float(entered_s.max())


class _Ring:
    """Seconds by rank; one rank stands for all where they are alike. behind: ranks ask behind what they send."""

    def __init__(self, busy_s: _Row, latency_s: _Row, asking_s: _Row, *, behind: bool) -> None:
        self.busy_s, self.latency_s, self.asking_s, self.behind = busy_s, latency_s, asking_s, behind

    def around_s(self, entered_s: _Row, segments: int) -> _Row:
        """When each rank has received so many segments, and sent as many."""
        followed = min(segments, _FOLLOWED + 2 * len(entered_s))
        given, left, arrived, ended = [entered_s] * 3, [entered_s] * 3, [entered_s] * 2, []
        for _ in range(followed):
            posted = arrived[-2]
            asking = posted
            if self.behind:  # the last segment that was given away by then
                behind = np.where(given[-2] <= posted, left[-2], left[-3])
                asking = np.maximum(posted, np.where(given[-1] <= posted, left[-1], behind))
            asked = np.roll(asking, -1) + self.asking_s
            given.append(np.maximum(given[-1], np.maximum(posted, asked)))
            left.append(np.maximum(given[-1], left[-1]) + self.busy_s)
            arrived.append(np.roll(left[-1] + self.latency_s, 1))
            ended.append(np.maximum(arrived[-1], arrived[-2]))
        steady = len(entered_s) + _FOLLOWED // 2
        rate_s: Any = (ended[-1] - ended[-1 - steady]) / steady if segments > followed else 0.0
        done: _Row = ended[-1] + (segments - followed) * rate_s
        return done
