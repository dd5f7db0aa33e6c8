"""Hops: what a microbatch takes between two stages on their devices, as the program's own messages are priced."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.planner.arrangements import Seat
from cost_model.cluster import Cluster
from cost_model.crossing import End, messages

_Row = tuple[tuple[int, int], int]
"""Sender and receiver, and bytes."""


@dataclass(frozen=True, eq=False)
class Hops:
    """On one cluster."""

    cluster: Cluster

    def seconds(self, source: Seat, target: Seat, nbytes: int, split: bool) -> tuple[float, float]:
        """There and back, and of the busier way without what an empty message takes; infinite where the source cannot
        hold as much. nbytes: that each rank of the target gets; split: which is a part."""
        whole = nbytes * (target.mesh.tp if split else 1) * target.mesh.dp
        parts = source.mesh.dp * (source.mesh.tp if split else 1)
        if whole % parts:
            return math.inf, math.inf
        here = End(source.mesh, split and source.mesh.tp > 1, whole // parts)
        there = End(target.mesh, split and target.mesh.tp > 1, nbytes)
        ways = (here, source, there, target), (there, target, here, source)
        each = [self._one_way_s(*way) for way in ways]
        return sum(start_s + busy_s for start_s, busy_s in each), max(busy_s for _, busy_s in each)

    def _one_way_s(self, here: End, source: Seat, there: End, target: Seat) -> tuple[float, float]:
        """Of an empty message, and beyond it, on the rank that takes longest."""
        senders, receivers = (dict(zip(seat.mesh.cells(), seat.devices, strict=True)) for seat in (source, target))
        rows = [((senders[m.source], receivers[m.target]), m.numel) for m in messages(here, there)]
        users = dict(zip((pair for pair, _ in rows), self.cluster.senders([pair for pair, _ in rows]), strict=True))
        by_rank: defaultdict[tuple[int, bool], list[_Row]] = defaultdict(list)
        for pair, nbytes in rows:
            by_rank[pair[0], True].append((pair, nbytes))
            by_rank[pair[1], False].append((pair, nbytes))
        return max((self._rank_s(own, users) for own in by_rank.values()), key=sum)

    def _rank_s(self, rows: Sequence[_Row], users: dict[tuple[int, int], int]) -> tuple[float, float]:
        """They take turns on the rank's link, but for those whose rate counts already that others share it."""
        start_s = turns_s = shared_s = 0.0
        for pair, nbytes in rows:
            empty_s = self.cluster.transfer_time_s(0, *pair, users[pair])
            own_s = self.cluster.transfer_time_s(nbytes, *pair, users[pair]) - empty_s
            start_s = max(start_s, empty_s)
            turns_s, shared_s = (turns_s, max(shared_s, own_s)) if users[pair] > 1 else (turns_s + own_s, shared_s)
        return start_s, max(turns_s, shared_s)
