"""The search on an uneven network: every mesh is placed before it is judged.

Meshes come in the order of a bound under all their placements. Each is laid out in a few ways, and the search ends at a
bound above the best prices found. The best few are placed in earnest, planned in full (``search``, every degree pinned)
and simulated on their own links, under each schedule; the fastest is the answer.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from autopar.planner.bounds import Objective
from autopar.planner.chain import Chain
from autopar.planner.configuration import Configuration
from autopar.planner.factor_graph import FactorGraph
from autopar.planner.layouts import configurations
from autopar.planner.least import quick_bound_s
from autopar.planner.placed_prices import MAX_WINDOW, IntArray, Places, Prices, Traffic
from autopar.planner.placement import Placed, Sketched, exactly, glanced, improved, is_exact, sketched
from autopar.planner.segment import Segment
from autopar.planner.solution import Infeasible, Pins, Solution, Space
from cost_model.cluster import Cluster, Level
from cost_model.collectives import Link
from cost_model.network import Network

FINALISTS, FINALISTS_OF_FEW, FEW = 4, 8, 8  # the latter on clusters of so many devices, where each takes no time
OF_ONE_SHAPE = 2  # before meshes of other shapes
IMPROVED = 2  # as many candidates as there are finalists, and again, are placed in earnest
SLACK = 0.1
"""On more than a few devices no plan is made of a mesh whose price is so much above that of the fastest plan's; prices
err by less, but for what a few sums do not see (docs/slow_networks.md)."""
WORTH = 0.01
"""Of a step, what whole state must be able to save to be planned for."""
MAX_MICROBATCH = 16
MANY = 10**6
EXCHANGES_PER_SEGMENT = 4  # all_reduces of an activation: two each way, as in an attention and a perceptron
_T = TypeVar("_T")
Answers = Sequence[Solution | Infeasible]
Search = Callable[[Pins, int], Answers]
"""Of a mesh, with room for gradients that are summed in groups of so many replicas first."""
Whole = Callable[[Pins, Sequence[Solution], float], Answers]
"""Of a mesh with whole state on each replica; none where no placed plan could gain as much as a least by that."""
Simulate = Callable[[Solution, float], tuple[float, Solution]]


class Volumes(Protocol):
    """What a model sends on a mesh: the largest activation between segments, or between so many stages, all gradients;
    of how many segments it is, in which dtype its products are, and whether replicas exchange something in every
    microbatch.
    """

    def sent_bytes(self, microbatch_size: int, pp: int | None = None) -> float: ...

    @property
    def reduced_bytes(self) -> float: ...

    @property
    def segments(self) -> int: ...

    @property
    def product_dtype(self) -> str: ...

    @property
    def replicas_meet(self) -> bool: ...


@dataclass(frozen=True)
class Candidate:
    """A mesh with what it sends; order: breaks ties."""

    order: int
    configuration: Configuration
    prices: Prices
    bound_s: float


def fastest_view(cluster: Cluster, dtype: str) -> Cluster:
    """As many devices as the cluster has, all as fast as its fastest and with as much memory as the one with the least,
    in equal nodes of as many as the cluster can be divided into, and as near as its nearest.

    dtype: in which devices are compared.
    """
    network = cluster.network
    assert network is not None
    device = cluster.devices[int(Places(cluster, dtype).slowness.argmin())]
    usable = min(device.usable_bytes for device in cluster.devices)
    fastest = device.with_memory(usable + device.reserve_bytes)
    inner, count = _largest_group(network), cluster.num_devices
    levels = [_level("between", network, count, ~network.same_node if inner > 1 else ~np.eye(count, dtype=bool))]
    if 1 < inner:
        levels.insert(0, _level("inside", network, inner, network.same_node & ~np.eye(count, dtype=bool)))
    return Cluster(cluster.name, (fastest,) * count, tuple(levels[: 1 if inner == count else 2]), cluster.backend)


def _largest_group(network: Network) -> int:
    """Of so many devices the largest equal groups are that lie on one node each."""
    return math.gcd(*network.sizes)


def _level(name: str, network: Network, size: int, chosen: np.typing.NDArray[np.bool_]) -> Level:
    """The fastest of some links."""
    chosen = chosen if chosen.any() else ~np.eye(len(network), dtype=bool)
    link = Link(float(network.latencies_s[chosen].min()), float(network.bandwidths[chosen].max()))
    return Level(name, size, network.start_s, link)


def search_placed(
    cluster: Cluster,
    space: Space,
    batch: int,
    pins: Pins,
    volumes: Volumes,
    search: Search,
    whole: Whole,
    simulate: Simulate,
) -> Solution | Infeasible:
    """The fastest plan with its placement. ``space`` is that of the fastest view.

    search, whole: plan a mesh in full, under the least memory and where devices differ in it, under more; simulate: the
    seconds of a placed plan, infinite where it does not fit or is slower than a limit, and it as its devices run it
    best.
    """
    found, bound_s = _candidates(cluster, space, batch, pins, volumes)
    race = _Race(pins, search, whole, simulate, bound_s, few=cluster.num_devices <= FEW)
    plain = (pins.window, 1)
    for candidate, placed in found:
        if placed.cost_s <= race.worth_s:
            race.run(candidate, placed, _room(candidate, placed, pins))
    for candidate, placed in found if race.winner is None else [race.winner]:
        if _room(candidate, placed, pins) != plain:
            race.run(candidate, placed, plain)
    if race.best is not None:
        return race.best
    return race.short if race.short is not None else search(pins, 1)[0]


@dataclass(eq=False)
class _Race:
    """Plans of the best meshes, the fastest so far. worth_s: no plan is made of meshes of a higher price; known: those
    that were simulated, each by its mesh and stages."""

    pins: Pins
    search: Search
    whole: Whole
    simulate: Simulate
    bound_s: float
    few: bool
    best_s: float = math.inf
    best: Solution | None = None
    winner: tuple[Candidate, Placed] | None = None
    short: Infeasible | None = None
    worth_s: float = math.inf
    known: list[Solution] = field(default_factory=list)

    def run(self, candidate: Candidate, placed: Placed, room: tuple[int | None, int]) -> None:
        """Plans of a mesh on its placements, with room for a window and for groups of replicas; then with whole state,
        where that could gain something."""
        window, dp_inner = room
        answers = self._searched(lambda known: self.search(known, dp_inner), candidate.configuration, window)
        placed_plans = [each for answer in answers for each in self._timed(answer, candidate, placed)]
        least_s = WORTH * self.best_s
        answers = self._searched(
            lambda known: self.whole(known, placed_plans, least_s), candidate.configuration, window
        )
        for answer in answers:
            self._timed(answer, candidate, placed)

    def _timed(self, answer: Solution | Infeasible, candidate: Candidate, placed: Placed) -> list[Solution]:
        """A plan on each of the placements, simulated there; none where it was before."""
        if isinstance(answer, Infeasible):
            fewer = self.short is None or answer.needed_bytes < self.short.needed_bytes
            self.short = answer if fewer else self.short
            return []
        if any(_is_same(answer, other) for other in self.known):
            return []
        self.known.append(answer)
        found = []
        for devices in dict.fromkeys((placed.devices, *placed.others)):
            step_s, solution = self.simulate(replace(answer, placement=devices), self.best_s)
            found.append(solution)
            if step_s < self.best_s:
                self._leads(step_s, solution, (candidate, placed))
        return found

    def _searched(self, search: Callable[[Pins], Answers], c: Configuration, window: int | None) -> Answers:
        """In a window of half the size, and half of that, where nothing fits."""
        known = replace(self.pins, dp=c.dp, tp=c.tp, pp=c.pp, microbatch_size=c.microbatch_size, window=window)
        found = search(known)
        narrower = window // 2 if window is not None and self.pins.window is None else 1
        if narrower < 2 or not found or any(isinstance(answer, Solution) for answer in found):
            return found
        return self._searched(search, c, narrower)

    def _leads(self, step_s: float, solution: Solution, winner: tuple[Candidate, Placed]) -> None:
        cost_s = winner[1].cost_s
        gap, notes = max(0.0, cost_s / self.bound_s - 1.0), (*solution.notes, _note(winner[1]))
        self.best_s, self.best, self.winner = step_s, replace(solution, gap=gap, notes=notes), winner
        self.worth_s = math.inf if self.few else cost_s * (1 + SLACK)


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


def _finalists(cluster: Cluster) -> int:
    return FINALISTS_OF_FEW if cluster.num_devices <= FEW else FINALISTS


def _note(placed: Placed) -> str:
    how = "every placement was tried" if placed.exact else f"its placement is within {placed.gap:.1%} of a bound"
    return f"devices and links differ: the plan was placed on them, and {how}"


def _candidates(
    cluster: Cluster, space: Space, batch: int, pins: Pins, volumes: Volumes
) -> tuple[list[tuple[Candidate, Placed]], float]:
    """The best meshes with their placements, and a bound under all of them."""
    queue = sorted(_bounded(cluster, space, batch, pins, volumes), key=lambda c: (c.bound_s, c.order))
    wanted, laid_out = _finalists(cluster), list[_LaidOut]()
    for candidate in queue:
        if len(laid_out) >= IMPROVED * wanted and candidate.bound_s > sorted(r.cost_s for r in laid_out)[wanted - 1]:
            break
        found = sketched(candidate.prices, candidate.bound_s)
        laid_out.append(_LaidOut(found.cost_s, candidate.order, candidate, found))
    ranked = sorted(_glanced(laid_out, wanted), key=_LaidOut.key)
    best = _of_each_shape(ranked, lambda each: each.candidate)[: IMPROVED * wanted]
    placed = _shared([(each.candidate, each.placed()) for each in best])
    placed.sort(key=lambda pair: (pair[1].cost_s, pair[0].order))
    bound_s = min((candidate.bound_s for candidate in queue), default=math.inf)
    chosen = _of_each_shape(placed, lambda pair: pair[0])[:wanted]
    return sorted(chosen, key=lambda pair: (pair[1].cost_s, pair[0].order)), bound_s


def _of_each_shape(ranked: Sequence[_T], candidate: Callable[[_T], Candidate]) -> list[_T]:
    """The first few of each shape before all others: microbatches of different sizes have much the same price."""
    seen = Counter[tuple[int, ...]]()
    first, rest = list[_T](), list[_T]()
    for each in ranked:
        shape = candidate(each).prices.shape
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
        known_s = sorted(each.cost_s for each in found)[:wanted]
        if len(known_s) == wanted and min(each.candidate.bound_s for each in own) > known_s[-1]:
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


def _bounded(cluster: Cluster, space: Space, batch: int, pins: Pins, volumes: Volumes) -> Iterator[Candidate]:
    """Every mesh that may be, with the price that none of its placements is under."""
    whole_s = _whole_seconds(space, volumes)
    view, places = fastest_view(cluster, volumes.product_dtype), Places(cluster, volumes.product_dtype)
    for number, c in enumerate(configurations(cluster.num_devices, batch, pins)):
        if c.pp > volumes.segments or (pins.microbatch_size is None and c.microbatch_size > MAX_MICROBATCH):
            continue
        if pins.tp is None and not _may_shard(whole_s, view, c, volumes):
            continue
        if not math.isfinite(whole_s(c.dp, c.tp, c.microbatch_size)):
            continue
        prices = Prices(places, _traffic(view, c, whole_s, volumes))
        yield Candidate(number, c, prices, prices.bound_s())


WholeSeconds = Callable[[int, int, int], float]


def _whole_seconds(space: Space, volumes: Volumes) -> WholeSeconds:
    """Seconds of all segments, forward and backward, of one microbatch on a mesh (dp, tp, microbatch size), by the
    first label of every shared variable; infinite where the mesh cannot be."""
    segments: dict[FactorGraph, Segment] = {}

    @functools.cache
    def alike_s(dp: int, tp: int, microbatch_size: int) -> float:
        chain = space.chain(dp, tp, microbatch_size)
        first = None if chain is None else _first_labels(chain)
        if first is None:
            return math.inf
        own = [segments.setdefault(graph, Segment(graph)) for graph in first.kinds]
        # Of so many microbatches, what is done once per step counts for nothing.
        return quick_bound_s(first, own, Objective(1, MANY)) / MANY

    # Replicas that do not meet take as long, however many there are.
    return lambda dp, tp, size: alike_s(dp if volumes.replicas_meet else 1, tp, size)


def _first_labels(chain: Chain) -> Chain | None:
    domains = chain.shared_domains()
    return chain.fixed({name: labels[0] for name, labels in domains.items()}) if all(domains.values()) else None


def _traffic(view: Cluster, c: Configuration, whole_s: WholeSeconds, volumes: Volumes) -> Traffic:
    """What shards exchange is taken out of the seconds of a stage, and priced where the shards are."""
    size, whole = c.microbatch_size, whole_s(c.dp, c.tp, c.microbatch_size)
    exchanged = EXCHANGES_PER_SEGMENT * 2 * (1 - 1 / c.tp) * volumes.sent_bytes(size) * volumes.segments
    alone_s = whole
    if c.tp > 1:
        near = view.levels[0].link.bandwidth_bytes_per_s
        alone_s = max(whole - exchanged / near, whole_s(c.dp, 1, size) / c.tp)
        alone_s = alone_s if math.isfinite(alone_s) else whole
    return Traffic(
        c.pp,
        c.dp,
        c.tp,
        c.microbatches,
        alone_s / c.pp,
        volumes.sent_bytes(size, c.pp),
        volumes.reduced_bytes / c.pp / c.tp,
        exchanged / c.pp,
    )


def smallest_cuts(cuts: Sequence[float], pp: int) -> list[float]:
    """Of each end of a stage but the last, the least of the cuts that are nearer to it than to others, of stages of
    equally many segments. cuts[i]: before segment i + 1."""
    count = len(cuts) + 1
    ends = (range(math.ceil(count * (k - 0.5) / pp), math.ceil(count * (k + 0.5) / pp)) for k in range(1, pp))
    return [min(cuts[i - 1] for i in own if 0 < i < count) for own in ends]


def _may_shard(whole_s: WholeSeconds, view: Cluster, c: Configuration, volumes: Volumes) -> bool:
    """Whether tensor parallelism can pay: shards of a segment exchange its activation at least once each way, on the
    fastest links at best, which must take less than they save. On few devices everything is tried."""
    if c.tp == 1 or view.num_devices <= FEW:
        return True
    alone_s = whole_s(c.dp, 1, c.microbatch_size)
    if not math.isfinite(alone_s):
        return True
    nbytes = int(volumes.sent_bytes(c.microbatch_size))
    exchanged_s = 2 * view.collective_time_s("all_reduce", nbytes, tuple(range(c.tp)))
    return exchanged_s * volumes.segments < alone_s * (1 - 1 / c.tp)
