"""Ranks that share cores: one that waits leaves its core to the others.

Prices are of all ranks at once, with ``crowding`` of them per core. While only some compute, each of those is faster:
with a rank to a core as fast as it is alone, before that as their number is smaller. A step in which all wait for one
rank is then ``crowding`` times as fast as its prices, and one in which none waits as they say. What a rank stands still
for while a message moves counts as computing: cores move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Span = tuple[float, float]
_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SharedClock:
    """What has passed at moments of a step whose ranks are priced as if all computed."""

    priced_s: _FloatArray
    passed_s: _FloatArray

    def __call__(self, priced_s: float) -> float:
        return float(np.interp(priced_s, self.priced_s, self.passed_s))

    def length_s(self, spans: Sequence[Span]) -> float:
        """Of all of them."""
        return float(np.diff(np.interp(np.array(spans), self.priced_s, self.passed_s)).sum()) if spans else 0.0


def shared_clock(waits: Sequence[tuple[int, Sequence[Span]]], end_s: float, crowding: float) -> SharedClock:
    """waits: how many ranks wait when, each of them once at a time; with those that are never named as many as there
    are. end_s: of the step, until which who has finished waits."""
    everyone = sum(ranks for ranks, _ in waits)
    starts = [(start_s, -ranks) for ranks, spans in waits for start_s, _ in spans]
    stops = [(stop_s, ranks) for ranks, spans in waits for _, stop_s in spans]
    changes = np.array([(0.0, everyone), *starts, *stops, (end_s, 0)])
    changes = changes[np.argsort(changes[:, 0], kind="stable")]
    computing = np.cumsum(changes[:-1, 1])
    pace = np.where(computing > 0, np.maximum(computing / everyone, 1 / crowding), 1.0)
    passed_s = np.concatenate(([0.0], np.cumsum(pace * np.diff(changes[:, 0]))))
    return SharedClock(changes[:, 0], passed_s)


def pipeline_passes(stages: int, microbatches: int, crowding: float) -> float:
    """How long microbatches take through stages that are equally slow, in what one takes in one stage while all
    compute: the fewer stages are filled, the faster are they. ``microbatches + stages - 1`` with a core for each."""
    filled = min(stages, microbatches)

    def pace(computing: int) -> float:
        return max(computing / stages, 1 / crowding)

    ramp = 2 * sum(pace(computing) for computing in range(1, filled))
    return ramp + (microbatches + stages + 1 - 2 * filled) * pace(filled)
