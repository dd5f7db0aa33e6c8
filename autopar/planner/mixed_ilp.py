"""The integer program of stages with meshes of their own: the columns of a stage are on several meshes and devices.

To the rows of ``autopar.planner.ilp`` comes one for each kind of device: the meshes that are chosen use them all, once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pulp

from autopar.planner.bounds import Objective
from autopar.planner.columns import Column, RangeTable
from autopar.planner.ilp import StageIlp, objective_s
from cost_model.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Offer:
    """A column on a mesh of one kind of device.

    column: with labels numbered alike on all meshes, 0 at the chain's ends; own: the same with those of its table.
    """

    column: Column
    own: Column
    table: RangeTable
    mesh: Mesh
    kind: int

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.mesh.size


class MixedIlp(StageIlp):
    """Invariant, besides that of ``StageIlp``: labels at cuts are numbered alike on all meshes."""

    def __init__(self, offers: Sequence[Sequence[Offer]], microbatches: int, devices: Sequence[int]) -> None:
        super().__init__([[offer.column for offer in own] for own in offers], Objective(len(offers), microbatches))
        self.mixed = tuple(tuple(own) for own in offers)
        for kind, count in enumerate(devices):
            self._devices_once(kind, count)

    def _devices_once(self, kind: int, count: int) -> None:
        """sum_s sum_{c of the kind} devices[c] x[s, c] = count"""
        terms = [
            (x, offer.devices)
            for picks, own in zip(self.picks, self.mixed, strict=True)
            for x, offer in zip(picks, own, strict=True)
            if offer.kind == kind
        ]
        self.problem += pulp.LpAffineExpression(terms) == count, f"devices_once_{kind}"


State = tuple[tuple[int, int], tuple[int, ...]]
"""((position in the chain, label there), devices used of each kind) before or after a stage."""
Way = tuple[Offer, State, State]
LEVELS = (1.0, 1.01, 1.03, 1.1, 1.3, 2.0, math.inf)
"""Times of the slowest stage, in those of the fastest that there can be, at which a first tiling is looked for."""


def worthwhile(offers: Sequence[Sequence[Offer]], devices: Sequence[int], microbatches: int) -> list[list[Offer]]:
    """The offers of each stage that lie on some tiling which uses all devices once and may be the best.

    States are few, as stages and kinds are, so shortest ways through them give good tilings and bounds of all others:
    the rest of a way at its shortest, and no stage faster than the slowest of the tiling whose slowest is fastest.
    """
    steps = _possible(offers, devices)
    if not all(steps):
        return [[] for _ in offers]
    start, end = _ends(devices, steps)
    slowest_s = _reached(steps, start, lambda o: o.column.time_s, max)[-1][end]
    best_s = min(_found_s(steps, start, end, slowest_s * level, microbatches) for level in LEVELS)
    reach, rest = _reached(steps, start, _cost_s), _reached(_reversed(steps), end, _cost_s)[::-1]
    found = []
    for stage, step in enumerate(steps):
        kept = {}
        for offer, before, after in step:
            along_s = reach[stage][before] + _cost_s(offer) + rest[stage + 1][after]
            least_s = along_s + (microbatches - 1) * max(slowest_s, offer.column.time_s) + offer.column.step_s
            if least_s <= best_s * (1 + 1e-9):
                kept[id(offer)] = offer
        found.append(list(kept.values()))
    return found


def _possible(offers: Sequence[Sequence[Offer]], devices: Sequence[int]) -> list[list[Way]]:
    """Every way of each stage that lies on a tiling which uses all devices once; an empty stage where there is none."""
    reached: dict[tuple[int, int], set[tuple[int, ...]]] = {(0, 0): {(0,) * len(devices)}}
    steps: list[list[Way]] = []
    for own in offers:
        step: list[Way] = []
        for offer in own:
            c = offer.column
            for used in reached.get((c.first, c.entry), ()):
                after = _used(used, offer)
                if after[offer.kind] <= devices[offer.kind]:
                    step.append((offer, ((c.first, c.entry), used), ((c.last, c.exit), after)))
        steps.append(step)
        reached = {}
        for _, _, (place, used) in step:
            reached.setdefault(place, set()).add(used)
    alive = {(place, used) for place, known in reached.items() for used in known if used == tuple(devices)}
    for stage in reversed(range(len(steps))):
        steps[stage] = [way for way in steps[stage] if way[2] in alive]
        alive = {way[1] for way in steps[stage]}
    return steps


def _ends(devices: Sequence[int], steps: Sequence[Sequence[Way]]) -> tuple[State, State]:
    """Where all tilings begin and end."""
    return ((0, 0), (0,) * len(devices)), steps[-1][0][2]


def _cost_s(offer: Offer) -> float:
    return offer.column.time_s + offer.column.cut_s


def _reversed(steps: Sequence[Sequence[Way]]) -> list[list[Way]]:
    return [[(offer, after, before) for offer, before, after in step] for step in reversed(steps)]


def _reached(
    steps: Sequence[Sequence[Way]],
    start: State,
    weigh: Callable[[Offer], float],
    fold: Callable[[float, float], float] = operator.add,
) -> list[dict[State, float]]:
    """Before each stage, and after the last: the least value of the ways to each state."""
    found = [{start: 0.0}]
    for step in steps:
        values: dict[State, float] = {}
        for offer, before, after in step:
            if before in found[-1]:
                value = fold(found[-1][before], weigh(offer))
                if value < values.get(after, math.inf):
                    values[after] = value
        found.append(values)
    return found


def _found_s(steps: Sequence[Sequence[Way]], start: State, end: State, slowest_s: float, microbatches: int) -> float:
    """What the shortest tiling of stages up to so slow takes."""
    near = [[way for way in step if way[0].column.time_s <= slowest_s] for step in steps]
    rest = _reached(_reversed(near), end, _cost_s)[::-1]
    state, chosen = start, []
    for stage, step in enumerate(near):
        onward = ((_cost_s(w[0]) + rest[stage + 1][w[2]], i) for i, w in enumerate(step)
                  if w[1] == state and w[2] in rest[stage + 1])  # fmt: skip
        offer, _, state = step[min(onward)[1]]
        chosen.append(offer.column)
    return objective_s(chosen, Objective(len(chosen), microbatches))


def _used(before: tuple[int, ...], offer: Offer) -> tuple[int, ...]:
    count = before[offer.kind] + offer.devices
    return (*before[: offer.kind], count, *before[offer.kind + 1 :])
