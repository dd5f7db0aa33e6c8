"""What leaves a rank over one shared rate."""

from __future__ import annotations

import bisect


class Egress:
    """When a rank's messages leave it: at once, or, where all of them share a rate, while no other one does."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.begins: list[float] = []
        self.ends: list[float] = []

    def send(self, ready_s: float, busy_s: float) -> tuple[float, float]:
        """From when to when a message leaves that is ready and takes so long: it fills the gaps that others leave."""
        if not self.shared or busy_s <= 0.0:
            return ready_s, ready_s + busy_s
        at = last = bisect.bisect_left(self.ends, ready_s)
        start = now = self._free_s(at, ready_s)
        while last < len(self.begins) and now + busy_s > self.begins[last]:
            busy_s -= max(0.0, self.begins[last] - now)
            now = self.ends[last]
            last += 1
        first = min([start, *self.begins[at:last]])
        self.begins[at:last], self.ends[at:last] = [first], [now + busy_s]
        return start, now + busy_s

    def _free_s(self, at: int, ready_s: float) -> float:
        """The first moment from then on in which nothing leaves; ``at``: the first interval that may not be over."""
        while at < len(self.begins) and self.begins[at] <= ready_s:
            ready_s, at = max(ready_s, self.ends[at]), at + 1
        return ready_s
