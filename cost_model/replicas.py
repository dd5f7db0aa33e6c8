"""Which replicas are likely to take longest: a few sums instead of a simulation."""

from __future__ import annotations

from collections.abc import Sequence

from cost_model.prices import Replicas, StagePrice

LIKELY = 2
"""So many of the first tell how schedules compare."""


def slowest_first(replicas: Replicas, microbatches: int) -> Replicas:
    """That with the slowest stage or channel, then that with the longest way, then the others in their order."""
    slow = max(replicas, key=lambda own: _way_s(own) + microbatches * _slowest_s(own))
    far = max(replicas, key=_way_s)
    return tuple({id(own): own for own in (slow, far, *replicas)}.values())


def _way_s(prices: Sequence[StagePrice]) -> float:
    """Through all stages and messages, there and back."""
    return sum(chunk.blocks_s + chunk.to_next_s + chunk.from_next_s for price in prices for chunk in price.chunks)


def _slowest_s(prices: Sequence[StagePrice]) -> float:
    """What each further microbatch takes: the slowest stage or channel, or both messages of a stage where they share a
    rate."""
    slowest_s = back_s = 0.0
    for price in prices:
        there_s = sum(chunk.to_next_s - chunk.delay_s for chunk in price.chunks)
        sent_s = there_s + back_s if price.shares_egress else max(there_s, back_s)
        slowest_s = max(slowest_s, sent_s, sum(chunk.blocks_s for chunk in price.chunks))
        back_s = sum(chunk.from_next_s - chunk.delay_s for chunk in price.chunks)
    return slowest_s
