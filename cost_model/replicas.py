"""Which replicas are likely to take longest: a few sums instead of a simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cost_model.prices import Replicas, StagePrice

FloatArray = npt.NDArray[np.float64]
LIKELY = 2
"""So many of the first tell how schedules compare."""


def slowest_first(replicas: Replicas, microbatches: int) -> Replicas:
    """That with the slowest stage or channel, then that with the longest way, then the others in their order."""
    slow = max(replicas, key=lambda own: _way_s(own) + microbatches * _slowest_s(own))
    far = max(replicas, key=_way_s)
    return tuple({id(own): own for own in (slow, far, *replicas)}.values())


def schedule_bound_s(replicas: Replicas, microbatches: int) -> float:
    """Seconds that no schedule takes less than: each stage does its part for every microbatch, after the first of them
    has come to it, and before the last one's gradient has gone back."""
    return max(_bound_s(own, microbatches) for own in replicas)


def _bound_s(prices: Sequence[StagePrice], microbatches: int) -> float:
    found_s = around_s = 0.0
    for price in prices:
        own_s = sum(chunk.forward.total_s + chunk.backward.total_s for chunk in price.chunks)
        found_s = max(found_s, around_s + microbatches * own_s)
        first = price.chunks[0]
        around_s += first.forward.total_s + first.to_next_s + first.from_next_s + first.backward.total_s
    return found_s


def _way_s(prices: Sequence[StagePrice]) -> float:
    """Through all stages and messages, there and back."""
    return sum(chunk.blocks_s + chunk.to_next_s + chunk.from_next_s for price in prices for chunk in price.chunks)


def _slowest_s(prices: Sequence[StagePrice]) -> float:
    """What each further microbatch takes: the slowest stage or channel."""
    return max(_channel_s(prices), *(sum(chunk.blocks_s for chunk in price.chunks) for price in prices))


def _channel_s(prices: Sequence[StagePrice]) -> float:
    """The messages of a microbatch in the slowest channel; both of a stage where they share a rate."""
    slowest_s = back_s = 0.0
    for price in prices:
        there_s = sum(chunk.to_next_s - chunk.delay_s for chunk in price.chunks)
        slowest_s = max(slowest_s, there_s + back_s if price.shares_egress else max(there_s, back_s))
        back_s = sum(chunk.from_next_s - chunk.delay_back_s for chunk in price.chunks)
    return slowest_s


class ReplicaSums:
    """Seconds of a step in a window that is wide enough, as far as sums tell, with other shares of the work: those of
    the slowest replica, then the longest of what stages do once."""

    def __init__(self, replicas: Replicas, microbatches: int) -> None:
        self._microbatches = microbatches
        blocks = [[sum(chunk.blocks_s for chunk in price.chunks) for price in own] for own in replicas]
        once = [
            [sum(price.step_collectives_s) + sum(price.step_gathers_s) + price.optimizer_s for price in own]
            for own in replicas
        ]
        self._blocks_s, self._once_s = np.array(blocks), np.array(once).max(axis=0)
        self._sent_s = np.array([_way_s(own) for own in replicas]) - self._blocks_s.sum(axis=1)
        self._channel_s = np.array([_channel_s(own) for own in replicas])

    @property
    def stages_s(self) -> tuple[FloatArray, FloatArray]:
        """[stage] all microbatches on the slowest replica, and what is done once."""
        return self._microbatches * self._blocks_s.max(axis=0), self._once_s

    def steps_s(self, shares: FloatArray, once: FloatArray) -> FloatArray:
        """[cut] at [cut, stage] times as much work in every microbatch, and once a step."""
        blocks = shares[:, None] * self._blocks_s
        slowest = np.maximum(blocks.max(axis=2), self._channel_s)
        along = blocks.sum(axis=2) + self._sent_s + (self._microbatches - 1) * slowest
        found: FloatArray = along.max(axis=1) + (once * self._once_s).max(axis=1)
        return found
