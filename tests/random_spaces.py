"""Chains of segments with random tables, and all plans of them: what searches are held against."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from autopar.planner.bounds import TIME_ONLY
from autopar.planner.factor_graph import COMPONENTS
from autopar.planner.layouts import configurations
from autopar.planner.least import least_costs
from autopar.planner.search import Chain, Configuration, Factor, FactorGraph, Floor
from autopar.planner.segment import Price, Segment
from autopar.planner.solution import Pins, Solution

DEVICES, BATCH, SEGMENTS = 2, 2, 3


LABELS = ("r", "s")


def random_kind(rng: np.random.Generator, entry: bool, exit: bool, tied: bool, step: bool) -> FactorGraph:
    """entry, an inner variable, exit and perhaps a tied one, all pairs costed, one combination forbidden."""
    names = [name for name, there in (("in", entry), ("inner", True), ("out", exit), ("tied", tied)) if there]
    domains = dict.fromkeys(names, LABELS)
    factors = []
    for scope in itertools.combinations(names, 2):
        time_s, step_s, state, saved = (rng.integers(1, 30, (2, 2)).astype(float) for _ in COMPONENTS)
        factors.append(Factor(scope, time_s, step_s if step else None, state, saved))
    forbidden = np.zeros((2, 2))
    forbidden[tuple(rng.integers(0, 2, 2))] = np.inf
    factors.append(Factor((names[0], "inner") if entry else ("inner", names[-1]), forbidden))
    return FactorGraph(
        domains, tuple(factors), "in" if entry else None, "out" if exit else None, ("tied",) if tied else ()
    )


class AsItIs:
    """A space without ways to trade time for memory, of which nothing is known before a chain is made."""

    crowding: float = 1.0

    def floor(self, dp: int, tp: int, microbatch_size: int, above_s: float = -1.0) -> Floor | None:
        chain = self.chain(dp, tp, microbatch_size)
        return None if chain is None else Floor(len(chain), 0.0)

    def least_saved_bytes(self, dp: int, tp: int, microbatch_size: int) -> float:
        return 0.0

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain | None:
        raise NotImplementedError

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        chain = self.chain(dp, tp, microbatch_size)
        return () if chain is None else [chain]


@dataclass
class RandomSpace(AsItIs):
    """A chain of head, block and tail per mesh, each with its own random costs."""

    seed: int
    tied: bool = False
    step: bool = True
    crowding: float = 1.0

    def floor(self, dp: int, tp: int, microbatch_size: int, above_s: float = -1.0) -> Floor | None:
        """As high as it may be."""
        chain = self.chain(dp, tp, microbatch_size)
        if chain is None:
            return None
        segments, price = [Segment(graph) for graph in chain.kinds], Price(*TIME_ONLY)
        whole_s = float(least_costs(chain.sequence, segments, (price,))[0])
        alike = Counter(chain.sequence).items()
        return Floor(
            len(chain), whole_s, tuple((count, float(segments[k].costs((price,)).min())) for k, count in alike)
        )

    def least_saved_bytes(self, dp: int, tp: int, microbatch_size: int) -> float:
        chain = self.chain(dp, tp, microbatch_size)
        segments = [Segment(graph) for graph in chain.kinds]
        return float(least_costs(chain.sequence, segments, (Price(0.0, 0.0, 0.0, 1.0),))[0])

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain:
        rng = np.random.default_rng([self.seed, dp, tp, microbatch_size])
        shapes = ((False, True, self.tied), (True, True, False), (True, False, self.tied))
        kinds = tuple(random_kind(rng, *shape, self.step) for shape in shapes)
        cuts = {label: float(rng.integers(0, 5)) for label in LABELS}
        return Chain(kinds, (0, 1, 2), lambda i, label: cuts[label] + i, lambda i, j: 3 * (j - i))


class UpdatedSpace(RandomSpace):
    """State is as much whatever is chosen; its update needs more than what runs saves, or less."""

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain:
        chain = super().chain(dp, tp, microbatch_size)
        rng = np.random.default_rng([self.seed, dp, tp, 7])
        state, moment = (rng.integers(1, 80, len(chain.kinds)).astype(float) for _ in range(2))

        def kept(graph: FactorGraph, state: float) -> FactorGraph:
            first, *others = (replace(factor, state_bytes=None) for factor in graph.factors)
            return replace(graph, factors=(replace(first, state_bytes=np.full_like(first.time_s, state)), *others))

        kinds = tuple(kept(graph, own) for graph, own in zip(chain.kinds, state, strict=True))
        return replace(chain, kinds=kinds, update_bytes=lambda i, j: float(moment[list(chain.sequence[i:j])].sum()))


class SavingSpace(RandomSpace):
    """What a segment saves may also be made again; costs of both as random as the others."""

    def _with(self, chain: Chain, labels: tuple[str, ...]) -> Chain:
        rng = np.random.default_rng([self.seed, 7])
        kinds = []
        for graph in chain.kinds:
            time_s, saved = (rng.integers(1, 30, 2).astype(float) for _ in range(2))
            time_s[0], saved[1] = 0.0, 0.0
            factor = Factor(("again",), time_s[: len(labels)], None, None, saved[: len(labels)])
            domains = {**graph.domains, "again": labels}
            kinds.append(FactorGraph(domains, (*graph.factors, factor), graph.entry, graph.exit, graph.shared))
        return replace(chain, kinds=tuple(kinds))

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain:
        return self._with(super().chain(dp, tp, microbatch_size), ("keep",))

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        base = super().chain(dp, tp, microbatch_size)
        return [self._with(base, ("keep",)), self._with(base, ("keep", "spare"))]


@dataclass
class Whole:
    """All plans of a space that saves, for enumeration."""

    space: SavingSpace
    crowding: float = 1.0

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain:
        return self.space.saving_chains(dp, tp, microbatch_size)[-1]


def stage_totals(chain: Chain, tilings: Sequence[tuple[int, int]], chosen: Sequence[dict[str, str]]) -> np.ndarray:
    """[stage, 4] totals of one assignment of every segment."""
    totals = np.zeros((len(tilings), 4))
    for stage, (first, last) in enumerate(tilings):
        for position in range(first, last):
            graph = chain.kinds[chain.sequence[position]]
            for factor in graph.factors:
                at = tuple(graph.domains[v].index(chosen[position][v]) for v in factor.variables)
                totals[stage] += [0.0 if a is None else a[at] for a in factor.components()]
    return totals


def value(
    chain: Chain, tiling: Sequence[tuple[int, int]], chosen: Sequence[dict[str, str]], c: Configuration
) -> tuple[float, float]:
    """(objective, largest stage's bytes) of one complete plan."""
    totals = stage_totals(chain, tiling, chosen)
    if not np.isfinite(totals).all():
        return math.inf, math.inf
    cuts = sum(chain.cut_s(first, chosen[first]["in"]) for first, _ in tiling if first)
    waiting, slowest = weights(c)
    stages_s = waiting * totals[:, 0].sum() + slowest * totals[:, 0].max()
    time_s = float(stages_s + cuts + totals[:, 1].max())
    held = [chain.in_flight(c.schedule, s, c.pp, c.microbatches) for s in range(c.pp)]
    need = [
        totals[s, 2] + max(held[s] * totals[s, 3] + chain.reserve_bytes(*r), chain.update_bytes(*r))
        for s, r in enumerate(tiling)
    ]
    return time_s, float(max(need))


def weights(c: Configuration) -> tuple[float, float]:
    """Of all stages and of the slowest: linear between equally slow ones and one that alone is not empty."""
    part = 1 / 3 if c.schedule == "zero_bubble" else 1.0
    if c.pp == 1:
        return part, c.microbatches - part
    slots = [min(t, c.microbatches, c.pp, c.microbatches + c.pp - t) for t in range(1, c.microbatches + c.pp)]
    full_s = sum(max(computing / c.pp, 1 / c.crowding) for computing in slots)
    equal_s = c.microbatches + part * (full_s - c.microbatches)
    lone_s = c.microbatches * max(1 / c.pp, 1 / c.crowding)
    waiting = (equal_s - lone_s) / (c.pp - 1)
    return waiting, lone_s - waiting


def agrees(chosen: Sequence[dict[str, str]]) -> bool:
    tied = {labels["tied"] for labels in chosen if "tied" in labels}
    return len(tied) <= 1 and all(a["out"] == b["in"] for a, b in itertools.pairwise(chosen))


def every_plan(space: RandomSpace | Whole, pins: Pins) -> list[tuple[float, float]]:
    """(objective, largest stage's bytes) of every plan of every configuration that is not forbidden."""
    asked = configurations(DEVICES, BATCH, pins, space.crowding)
    return [plan for c in asked for plan in plans_of(space.chain(c.dp, c.tp, c.microbatch_size), c)]


def plans_of(chain: Chain, c: Configuration) -> list[tuple[float, float]]:
    """(objective, largest stage's bytes) of every plan of one configuration that is not forbidden."""
    single = [
        [dict(zip(g.domains, labels, strict=True)) for labels in itertools.product(*g.domains.values())]
        for g in (chain.kinds[k] for k in chain.sequence)
    ]
    plans = [chosen for chosen in itertools.product(*single) if agrees(chosen)]
    cuts = itertools.combinations(range(1, len(chain)), c.pp - 1)
    tilings = [list(itertools.pairwise((0, *each, len(chain)))) for each in cuts]
    found = [value(chain, tiling, chosen, c) for tiling in tilings for chosen in plans]
    return [plan for plan in found if math.isfinite(plan[0])]


def assert_consistent(space: RandomSpace | Whole, found: Solution, cap: float) -> None:
    """The solution's own figures are those of its assignments, and it fits."""
    c = found.configuration
    chain = space.chain(c.dp, c.tp, c.microbatch_size)
    tiling = [(stage.first, stage.last) for stage in found.stages]
    assert len(tiling) == c.pp and tiling[0][0] == 0 and tiling[-1][1] == SEGMENTS
    assert all(a.last == b.first and a.exit == b.entry for a, b in itertools.pairwise(found.stages))
    chosen = [dict(labels) for stage in found.stages for labels in stage.assignments]
    assert agrees(chosen)
    time_s, need = value(chain, tiling, chosen, c)
    assert time_s == pytest.approx(found.objective_s)
    assert need <= cap
