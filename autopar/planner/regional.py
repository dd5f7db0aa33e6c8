"""The search on an uneven network: every mesh is placed before it is judged.

Meshes come in the order of a bound under all their placements. Each is laid out in a few ways, and the search ends at a
bound above the best prices found. The best few are placed in earnest, planned in full (``search``, every degree pinned)
and simulated on their own links, under each schedule; the fastest is the answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from autopar.planner.candidates import FEW, Candidate, Volumes, candidates
from autopar.planner.configuration import Configuration
from autopar.planner.placed_prices import MAX_WINDOW
from autopar.planner.placement import Placed, Sketched, exactly, glanced, improved, is_exact, sketched
from autopar.planner.places import IntArray
from autopar.planner.solution import Infeasible, Pins, Solution, Space
from cost_model.cluster import Cluster
from cost_model.collectives import Link

FINALISTS, FINALISTS_OF_FEW = 4, 8  # the latter on clusters of few devices, where each takes no time
OF_ONE_SHAPE = 2  # before meshes of other shapes
IMPROVED = 2  # as many candidates as there are finalists, and again, are placed in earnest
SLACK, SLACK_OF_FEW = 0.1, 0.5
"""No plan is made of a mesh whose price is so much above that of the fastest plan's, and no more than so much below its
step: prices err by less, but for what a few sums do not see (docs/slow_networks.md). On few devices stages of one
segment tell more."""
WORTH = 0.01
"""Of a step, what whole state must be able to save to be planned for."""
_T = TypeVar("_T")
Answers = Sequence[Solution | Infeasible]
Search = Callable[[Pins, int, Link | None], Answers]
"""Of a mesh, with room for gradients that are summed in groups of so many replicas first, and shards on links that are
no faster."""
Simulate = Callable[[Solution, float], tuple[float, Solution]]


@dataclass(frozen=True)
class PlacedAnswer:
    """What a search found, and it as its devices run it best, on each placement."""

    answer: Solution
    plans: Sequence[Solution]


Whole = Callable[[Pins, Sequence[PlacedAnswer], float, Link | None], Answers]
"""Of a mesh with whole state on each replica; none where no placed plan could gain as much as a least by that."""


@dataclass(frozen=True, eq=False)
class Finalist:
    """A mesh with its placement; smaller: the same with smaller microbatches, by price."""

    candidate: Candidate
    placed: Placed
    smaller: tuple[Finalist, ...] = ()

    @property
    def price_s(self) -> float:
        return self.placed.cost_s

    def room(self, pins: Pins) -> tuple[int | None, int]:
        return _room(self.candidate, self.placed, pins)

    @property
    def link(self) -> Link | None:
        """The slowest between shards, where there are any."""
        prices = self.candidate.prices
        return prices.shard_link(self.cells) if prices.traffic.tp > 1 else None

    def next_smaller(self) -> Finalist | None:
        """What is tried where memory has no room for it: the best of at most half as large microbatches."""
        most = self.candidate.configuration.microbatch_size // 2
        found = [each for each in self.smaller if each.candidate.configuration.microbatch_size <= most]
        return replace(found[0], smaller=tuple(found[1:])) if found else None

    @property
    def cells(self) -> IntArray:
        return np.array(self.placed.devices).reshape(self.candidate.prices.shape)

    def key(self) -> tuple[float, int]:
        return self.price_s, self.candidate.order


@dataclass(frozen=True, eq=False)
class Finalists:
    """The best meshes with their placements, by price; bound_s: no mesh has a lower one; few: whether devices are."""

    found: Sequence[Finalist]
    bound_s: float
    few: bool

    @property
    def price_s(self) -> float:
        """Of the best."""
        return min((each.price_s for each in self.found), default=math.inf)


def finalists(cluster: Cluster, space: Space, batch: int, pins: Pins, volumes: Volumes) -> Finalists:
    """``space`` is that of the fastest view."""
    wanted = FINALISTS_OF_FEW if cluster.num_devices <= FEW else FINALISTS
    laid_out, bound_s = _laid_out(candidates(cluster, space, batch, pins, volumes), wanted)
    ranked = sorted(_glanced(laid_out, wanted), key=_LaidOut.key)
    best = _of_each_shape(ranked, lambda each: each.candidate)[: IMPROVED * wanted]
    placed = _shared([(each.candidate, each.placed()) for each in best])
    finals = sorted((Finalist(own, where) for own, where in placed), key=Finalist.key)
    chosen = sorted(_of_each_shape(finals, lambda each: each.candidate)[:wanted], key=Finalist.key)
    found = [replace(each, smaller=_smaller(each, laid_out)) for each in chosen]
    return Finalists(found, bound_s, few=cluster.num_devices <= FEW)


def _smaller(mesh: Finalist, laid_out: Sequence[_LaidOut]) -> tuple[Finalist, ...]:
    """The mesh with smaller microbatches on the same placement, by price."""
    own, found = mesh.candidate, list[Finalist]()
    for each in (each.candidate for each in laid_out):
        if each.shape == own.shape and each.configuration.microbatch_size < own.configuration.microbatch_size:
            cost_s = each.prices.cost_s(mesh.cells)
            found.append(Finalist(each, replace(mesh.placed, cost_s=cost_s)))
    return tuple(sorted(found, key=Finalist.key))


def search_placed(
    known: Finalists, pins: Pins, search: Search, whole: Whole, simulate: Simulate, limit_s: float = math.inf
) -> Solution | Infeasible | None:
    """The fastest plan with its placement, None where none is faster than a limit.

    search, whole: plan a mesh in full, under the least memory and where devices differ in it, under more; simulate: the
    seconds of a placed plan, infinite where it does not fit or is slower than a limit, and it as its devices run it
    best.
    """
    slack = SLACK_OF_FEW if known.few else SLACK
    race = _Race(pins, search, whole, simulate, known.bound_s, slack, limit_s, worth_s=limit_s * (1 + slack))
    plain = (pins.window, 1)
    for each in known.found:
        mesh: Finalist | None = each
        while mesh is not None and mesh.price_s <= race.worth_s:
            mesh = None if race.fits(mesh, plain) else mesh.next_smaller()
    for each in known.found if race.winner is None else [race.winner]:
        if each.price_s <= race.worth_s and each.room(pins) != plain:
            race.run(each, plain)
    if race.best is not None or math.isfinite(limit_s):
        return race.best
    return race.short if race.short is not None else search(pins, 1, None)[0]


@dataclass(eq=False)
class _Race:
    """Plans of the best meshes, the fastest so far. worth_s: no plan is made of meshes of a higher price; known: those
    that were simulated, each by its mesh and stages; too_large: of each shape, the smallest microbatch that memory has
    no room for."""

    pins: Pins
    search: Search
    whole: Whole
    simulate: Simulate
    bound_s: float
    slack: float
    best_s: float
    best: Solution | None = None
    winner: Finalist | None = None
    short: Infeasible | None = None
    worth_s: float = math.inf
    known: list[Solution] = field(default_factory=list)
    too_large: dict[object, int] = field(default_factory=dict)

    def fits(self, mesh: Finalist, plain: tuple[int | None, int]) -> bool:
        """Whether there are plans of a mesh, with the room that its placement asks for, or without."""
        shape, size = mesh.candidate.shape, mesh.candidate.configuration.microbatch_size
        if size >= self.too_large.get(shape, size + 1):
            return False
        if any(self.run(mesh, room) for room in dict.fromkeys((mesh.room(self.pins), plain))):
            return True
        self.too_large[shape] = size
        return False

    def run(self, mesh: Finalist, room: tuple[int | None, int]) -> bool:
        """Plans of a mesh on its placements, with room for a window and for groups of replicas; then with whole state,
        where that could gain something. Whether any fits."""
        (window, dp_inner), configuration, link = room, mesh.candidate.configuration, mesh.link
        answers = self._searched(lambda known: self.search(known, dp_inner, link), configuration, window)
        timed = [own for answer in answers for own in self._timed(answer, mesh)]
        least_s = WORTH * self.best_s
        for answer in self._searched(lambda known: self.whole(known, timed, least_s, link), configuration, window):
            self._timed(answer, mesh)
        return any(isinstance(answer, Solution) for answer in answers)

    def _timed(self, answer: Solution | Infeasible, mesh: Finalist) -> list[PlacedAnswer]:
        """A plan on each of the placements, simulated there; none where it was before."""
        if isinstance(answer, Infeasible):
            fewer = self.short is None or answer.needed_bytes < self.short.needed_bytes
            self.short = answer if fewer else self.short
            return []
        if any(_is_same(answer, other) for other in self.known):
            return []
        self.known.append(answer)
        found = []
        for devices in dict.fromkeys((mesh.placed.devices, *mesh.placed.others)):
            step_s, solution = self.simulate(replace(answer, placement=devices), self.best_s)
            found.append(solution)
            if step_s < self.best_s:
                self._leads(step_s, solution, mesh)
        return [PlacedAnswer(answer, found)]

    def _searched(self, search: Callable[[Pins], Answers], c: Configuration, window: int | None) -> Answers:
        """In a window of half the size, and half of that, where nothing fits."""
        known = replace(self.pins, dp=c.dp, tp=c.tp, pp=c.pp, microbatch_size=c.microbatch_size, window=window)
        found = search(known)
        narrower = window // 2 if window is not None and self.pins.window is None else 1
        if narrower < 2 or not found or any(isinstance(answer, Solution) for answer in found):
            return found
        return self._searched(search, c, narrower)

    def _leads(self, step_s: float, solution: Solution, winner: Finalist) -> None:
        cost_s = winner.placed.cost_s
        gap, notes = max(0.0, cost_s / self.bound_s - 1.0), (*solution.notes, _note(winner.placed))
        self.best_s, self.best, self.winner = step_s, replace(solution, gap=gap, notes=notes), winner
        self.worth_s = max(winner.price_s * (1 + self.slack), step_s / (1 + self.slack))


def _is_same(one: Solution, other: Solution) -> bool:
    """Whether two plans differ in no more than their window, which is chosen again once they are placed."""
    return replace(one.configuration, window=1) == replace(other.configuration, window=1) and one.stages == other.stages


def _room(candidate: Candidate, placed: Placed, pins: Pins) -> tuple[int | None, int]:
    """The window of 1f1b that hides what messages take on these devices, and the size of groups in which replicas sum
    gradients: what a plan that fills the memory without them has no room for."""
    prices, cells = candidate.prices, np.array(placed.devices).reshape(candidate.prices.shape)
    free = pins.window is None and pins.schedule in (None, "1f1b")
    window = min(prices.window(cells), MAX_WINDOW, candidate.configuration.microbatches) if free else 1
    return window if window > 1 else pins.window, prices.dp_inner(cells)


def _note(placed: Placed) -> str:
    how = "every placement was tried" if placed.exact else f"its placement is within {placed.gap:.1%} of a bound"
    return f"devices and links differ: the plan was placed on them, and {how}"


def _laid_out(found: Iterable[Candidate], wanted: int) -> tuple[list[_LaidOut], float]:
    """Those that may be among the best, and a bound under all of them."""
    laid_out, bound_s = list[_LaidOut](), math.inf
    for candidate in found:
        bound_s = min(bound_s, candidate.bound_s)
        if len(laid_out) >= IMPROVED * wanted and candidate.bound_s > _last_s(laid_out, wanted):
            break
        own = sketched(candidate.prices, candidate.bound_s)
        laid_out.append(_LaidOut(own.cost_s, candidate.order, candidate, own))
    return laid_out, bound_s


def _last_s(laid_out: Sequence[_LaidOut], wanted: int) -> float:
    """What the last of the best costs, a few of each shape."""
    seen = Counter[object]()
    for each in sorted(laid_out, key=_LaidOut.key):
        if seen[each.candidate.shape] < OF_ONE_SHAPE:
            seen[each.candidate.shape] += 1
            if seen.total() == wanted:
                return each.cost_s
    return math.inf


def _of_each_shape(ranked: Sequence[_T], candidate: Callable[[_T], Candidate]) -> list[_T]:
    """The first few of each shape before all others: microbatches of different sizes have much the same price."""
    seen = Counter[object]()
    first, rest = list[_T](), list[_T]()
    for each in ranked:
        shape = candidate(each).shape
        (first if seen[shape] < OF_ONE_SHAPE else rest).append(each)
        seen[shape] += 1
    return first + rest


@dataclass(frozen=True, eq=False)
class _LaidOut:
    """A mesh as it was sketched, and what it costs so or where devices were exchanged for another of its shape."""

    cost_s: float
    order: int
    candidate: Candidate
    sketched: Sketched
    known: tuple[IntArray, ...] = ()

    def key(self) -> tuple[float, int]:
        return self.cost_s, self.order

    def placed(self) -> Placed:
        prices = self.candidate.prices
        return exactly(prices) if is_exact(prices.places) else improved(self.sketched, *self.known)


def _glanced(laid_out: Sequence[_LaidOut], wanted: int) -> list[_LaidOut]:
    """All of them; of each shape, devices of the best are exchanged for a moment, and others take that where it is
    better for them. Sketches of unlike networks may be ten times as slow as what exchanges make of them."""
    shapes, found = dict[tuple[int, ...], list[_LaidOut]](), list[_LaidOut]()
    for each in sorted(laid_out, key=_LaidOut.key):
        shapes.setdefault(each.candidate.prices.shape, []).append(each)
    for own in shapes.values():
        if min(each.candidate.bound_s for each in own) > _last_s(found, wanted):
            found += own
            continue
        cells = glanced(own[0].sketched)
        for each in own:
            cost_s = each.candidate.prices.cost_s(cells)
            found.append(replace(each, cost_s=min(cost_s, each.cost_s), known=(cells,)))
    return found


def _shared(placed: list[tuple[Candidate, Placed]]) -> list[tuple[Candidate, Placed]]:
    """Each with the placement of another of its shape where that is better for it."""
    found = []
    for candidate, own in placed:
        for other, each in placed:
            if other.prices.shape == candidate.prices.shape:
                cost_s = candidate.prices.cost_s(np.array(each.devices).reshape(candidate.prices.shape))
                own = replace(own, devices=each.devices, cost_s=cost_s) if cost_s < own.cost_s else own
        found.append((candidate, own))
    return found
