"""One mesh for each stage, chosen with its devices: against enumeration, and against every plan of equal meshes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import example_gpt
from parity import ADAMW

import autopar
from autopar.meshes import may_differ
from autopar.planner.bounds import Objective
from autopar.planner.chain import Chain
from autopar.planner.columns import Column
from autopar.planner.factor_graph import Factor, FactorGraph
from autopar.planner.ilp import objective_s
from autopar.planner.mixed import MixedSolver, Pool, Shape
from autopar.planner.mixed_ilp import Offer
from autopar.planner.solution import Infeasible, Solution
from autopar.planner.worthwhile import worthwhile
from cost_model.errors import ParallelismError
from cost_model.mesh import Mesh

SEGMENTS, COUNTS = 3, (1, 3)
MESHES = tuple(Mesh(1, tp) for tp in (1, 2, 3))


def labels_of(tp: int) -> tuple[str, ...]:
    return ("R",) if tp == 1 else ("R", "S(0)")


class RandomSpace:
    """A chain of segments on one kind of device, with random costs of each pair of labels at their ends."""

    def __init__(self, seed: int, kind: int) -> None:
        self.seed, self.kind = seed, kind

    def chain(self, dp: int, tp: int, microbatch_size: int) -> Chain:
        rng, labels = np.random.default_rng([self.seed, self.kind, tp, microbatch_size]), labels_of(tp)
        kinds = []
        for number in range(SEGMENTS):
            domains = {"in": labels, "out": labels} if 0 < number < SEGMENTS - 1 else {}
            domains = domains or ({"out": labels} if number == 0 else {"in": labels})
            shape = (len(labels),) * len(domains)
            time_s, step_s, state, saved = (rng.integers(1, 30, shape).astype(float) for _ in range(4))
            factor = Factor(tuple(domains), time_s, step_s, state, saved)
            ends = (name if name in domains else None for name in ("in", "out"))
            kinds.append(FactorGraph(domains, (factor,), *ends, ()))
        return Chain(tuple(kinds), tuple(range(SEGMENTS)), lambda i, label: 0.0, lambda i, j: 0)

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        return [self.chain(dp, tp, microbatch_size)]


def cut_s(mesh: Mesh, samples: int, position: int, label: str) -> float:
    return position + (2.0 if label == "R" else 1.0) / mesh.tp


def solver(seed: int, cap_bytes: float) -> MixedSolver:
    firsts = (0, *itertools.accumulate(COUNTS))
    pools = [
        Pool(tuple(range(first, first + count)), RandomSpace(seed, kind), cap_bytes)
        for kind, (first, count) in enumerate(zip(firsts, COUNTS, strict=False))
    ]
    return MixedSolver(pools, cut_s)


def every_plan(seed: int, pp: int, microbatches: int) -> list[tuple[float, float]]:
    """(objective, largest stage's bytes) of every choice of ends, meshes, devices and labels."""
    found = []
    for cuts in itertools.combinations(range(1, SEGMENTS), pp - 1):
        ranges = list(itertools.pairwise((0, *cuts, SEGMENTS)))
        for own in itertools.product(itertools.product(MESHES, range(len(COUNTS))), repeat=pp):
            used = [sum(mesh.size for mesh, kind in own if kind == k) for k in range(len(COUNTS))]
            if tuple(used) == COUNTS:
                found += _plans(seed, ranges, own, microbatches)
    return found


def _plans(
    seed: int, ranges: list[tuple[int, int]], own: Sequence[tuple[Mesh, int]], microbatches: int
) -> list[tuple[float, float]]:
    """Boundaries inside a stage have labels of its mesh, cuts any that both meshes have; one shard has all."""
    pp, stage_of = len(ranges), {i: s for s, (first, last) in enumerate(ranges) for i in range(first, last)}
    domains = []
    for boundary in range(1, SEGMENTS):
        tps = {own[stage_of[side]][0].tp for side in (boundary - 1, boundary)}
        is_cut = stage_of[boundary - 1] != stage_of[boundary]
        domains.append(("R",) if tps == {1} and not is_cut else ("R", "S(0)"))
    found = []
    for labels in itertools.product(*domains):
        totals, cuts = np.zeros((pp, 4)), 0.0
        for stage, (first, last) in enumerate(ranges):
            mesh, kind = own[stage]
            graphs = RandomSpace(seed, kind).chain(1, mesh.tp, 8).kinds
            for i in range(first, last):
                ends = ([labels[i - 1]] if i else []) + ([labels[i]] if i < SEGMENTS - 1 else [])
                at = tuple(labels_of(mesh.tp).index(label) if mesh.tp > 1 else 0 for label in ends)
                totals[stage] += [part[at] for part in graphs[i].factors[0].components() if part is not None]
            if first:
                cuts += cut_s(mesh, 0, first, labels[first - 1] if mesh.tp > 1 else "R")
        held = [min(pp - stage, microbatches) for stage in range(pp)]
        time_s = totals[:, 0].sum() + cuts + (microbatches - 1) * totals[:, 0].max() + totals[:, 1].max()
        found.append((float(time_s), float((totals[:, 2] + np.array(held) * totals[:, 3]).max())))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.sampled_from([1, 4]))
def test_as_fast_as_the_fastest_of_all(seed: int, pp: int, microbatches: int) -> None:
    plans = every_plan(seed, pp, microbatches)
    shape = Shape((MESHES,) * pp, 8, microbatches, "1f1b")
    free = solver(seed, math.inf)
    found = free.solve(shape)
    assert isinstance(found, Solution) and found.meshes is not None and found.placement is not None
    assert found.objective_s == pytest.approx(min(plans)[0]) and found.gap == pytest.approx(0, abs=1e-9)
    assert free.bound_s(shape) <= found.objective_s * (1 + 1e-9)
    assert sorted(found.placement) == list(range(sum(COUNTS)))
    assert sum(mesh.size for mesh in found.meshes) == sum(COUNTS)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_under_a_cap(seed: int, share: float) -> None:
    """Never over the cap nor faster than the fastest that fits; where nothing fits, the least that any plan needs."""
    plans = every_plan(seed, 2, 4)
    needs = sorted(need for _, need in plans)
    cap = needs[0] - 1 + share * (needs[-1] - needs[0])
    found = solver(seed, cap).solve(Shape((MESHES,) * 2, 8, 4, "1f1b"))
    fitting = [time_s for time_s, need in plans if need <= cap]
    if not fitting:
        assert isinstance(found, Infeasible) and found.needed_bytes == needs[0]
        return
    assert isinstance(found, Solution)
    best = min(fitting)
    assert any(t == pytest.approx(found.objective_s) and need <= cap for t, need in plans)
    assert found.objective_s >= best * (1 - 1e-9) and found.bound_s <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("microbatches", [1, 8, 10**6])
def test_few_of_many_columns_are_left_and_the_best_are_among_them(seed: int, microbatches: int) -> None:
    """Two stages of which one has two devices: more than a thousand columns of each, all pairs enumerated."""
    draw, cuts, variants = np.random.default_rng(seed), 60, 12
    offers: list[list[Offer]] = [[], []]
    for stage, cut, size, _ in itertools.product((0, 1), range(1, cuts), (1, 2), range(variants)):
        length = (cut if stage == 0 else cuts - cut) * draw.uniform(1.0, 1.3) / size
        ends = (0, cut, 0, int(draw.integers(2))) if stage == 0 else (cut, cuts, int(draw.integers(2)), 0)
        numbers = (*ends, length, float(draw.uniform(0, 30)) * size, 0.0, 0.0, float(draw.uniform(0, 5)), ())
        column = Column(*numbers)
        offers[stage].append(Offer(column, column, None, Mesh(1, size), 0))  # type: ignore[arg-type]
    pairs = [
        (objective_s([a.column, b.column], Objective(2, microbatches)), a, b)
        for a, b in itertools.product(*offers)
        if (a.column.last, a.column.exit) == (b.column.first, b.column.entry) and a.devices + b.devices == 3
    ]
    best = min(pairs, key=lambda pair: pair[0])
    left = worthwhile(offers, (3,), microbatches)
    assert best[1] in left[0] and best[2] in left[1]
    assert sum(map(len, left)) <= 100 < sum(map(len, offers)) / 10


def test_no_meshes_that_use_all_devices() -> None:
    assert solver(0, math.inf).solve(Shape(((Mesh(1, 1),), (Mesh(1, 2),)), 8, 1, "1f1b")) is None


# --- A cluster of several kinds


def mixed_cluster() -> autopar.Cluster:
    """One fast device and two that are half as fast, near to each other."""
    shape = (3, 3)
    devices = ["a100-sxm-80gb", "v100-sxm2-16gb", "v100-sxm2-16gb"]
    bandwidth = np.full(shape, 100e9)
    return autopar.Cluster.from_matrix(device=devices, latency_s=np.full(shape, 5e-6), bandwidth_bytes_per_s=bandwidth)


def test_on_mixed_devices_no_plan_of_equal_meshes_is_as_fast() -> None:
    """Two slow devices make one stage beside the fast one: the planner finds it, and it beats every uniform grid."""
    model, _ = example_gpt(n_layer=4, n_embd=512, vocab_size=2048, block_size=128)
    tokens = torch.randint(0, 2048, (16, 129), generator=torch.Generator().manual_seed(1))
    batch = {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    def estimate(**pins: int) -> autopar.Estimate | None:
        parallelism = autopar.Parallelism(microbatch_size=8, schedule="1f1b", **pins)
        try:
            return autopar.estimate(model, mixed_cluster(), batch, optimizer=ADAMW, parallelism=parallelism)
        except ParallelismError:
            return None

    grids = [{"dp": dp, "tp": 3 // dp // pp, "pp": pp} for dp, pp in ((1, 1), (1, 3), (3, 1))]
    uniform = [found.step_time_s for pins in grids if pins["dp"] == 1 and (found := estimate(**pins)) is not None]
    chosen = estimate()
    assert chosen is not None and uniform
    assert chosen.plan.meshes_differ and sorted(mesh.size for mesh in chosen.plan.meshes) == [1, 2]
    assert chosen.step_time_s < 0.99 * min(uniform)
    pair = next(ranks for ranks in chosen.plan.stage_devices if len(ranks) == 2)
    assert pair == (1, 2) and any("meshes of their own" in note for note in chosen.notes)


@pytest.mark.parametrize(("kinds", "tried"), [(1, True), (3, True), (5, False)])
def test_meshes_of_many_kinds_of_devices_are_not_looked_for_unasked(kinds: int, tried: bool) -> None:
    names = ("v100-sxm2-16gb", "v100-sxm2-32gb", "a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm")[:kinds]
    devices = [names[i % kinds] for i in range(6)]
    every = np.ones((6, 6))
    cluster = autopar.Cluster.from_matrix(device=devices, latency_s=every, bandwidth_bytes_per_s=every)
    assert may_differ(autopar.Parallelism(), cluster) == tried
