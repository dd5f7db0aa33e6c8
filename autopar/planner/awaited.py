"""Awaited: what stages wait for each other's messages, from prices alone.

A stage begins a microbatch only once another of those that it has under way is back, through all stages after it and
their messages: so many of them take no less than that way does.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.planner.chain import in_flight
from autopar.planner.configuration import Configuration
from autopar.planner.placed_prices import MAX_WINDOW
from autopar.planner.solution import FEWEST_PARTS, Pins, StageSolution


def awaited_s(stages: Sequence[StageSolution], c: Configuration, pins: Pins, rooms: Sequence[float]) -> float:
    """What a step takes beside its price, in the schedule that waits least of those that have room: where it is 1f1b
    that was priced, and nothing else is pinned, a wider window, zero bubble, or virtual stages.

    rooms: microbatches that each stage can hold.
    """
    if c.pp == 1 or c.schedule not in ("1f1b", "zero_bubble"):
        return 0.0
    shapes = [(c.schedule, 1, c.window)]
    if c.schedule == "1f1b" and pins.window is None:
        shapes += [("1f1b", 1, window) for window in range(2, MAX_WINDOW + 1)]
        shapes += [("zero_bubble", 1, 1), ("interleaved", FEWEST_PARTS, 1)] if pins.schedule is None else []
    found: list[float] = []
    for schedule, *shape in shapes:
        held = [in_flight(schedule, stage, c.pp, c.microbatches, *shape) for stage in range(c.pp)]
        if not found or all(count <= room for count, room in zip(held, rooms, strict=True)):
            found.append(_waits_s(stages, c, held, schedule))
    return max(0.0, min(found))


def _waits_s(stages: Sequence[StageSolution], c: Configuration, held: Sequence[int], schedule: str) -> float:
    """Under a schedule by which stages hold so many microbatches, beside the price that was asked for.

    zero_bubble makes gradients of parameters, a third of a stage, once others have what they wait for, but before it
    begins the next microbatch; those it still owes it holds, but they are not under way. Virtual stages send messages
    of their own, and have more of them under way.
    """
    times, sent_s = [stage.time_s for stage in stages], sum(stage.cut_s for stage in stages)
    filling_s, late = sum(times) - max(times), 1 / 3 if schedule == "zero_bubble" else 0.0
    if schedule == "interleaved":
        return FEWEST_PARTS * sent_s - (1 - 1 / FEWEST_PARTS) * filling_s
    after, most = 0.0, 0.0
    for k in reversed(range(c.pp)):
        count = min(held[k], c.pp - k) if late else held[k]
        most = max(most, (c.microbatches - count) * ((after + times[k]) / count - max(times)))
        after += (1 - late) * times[k] + stages[k].cut_s
    return most - (2 * late * filling_s if c.schedule == "1f1b" else 0.0)
