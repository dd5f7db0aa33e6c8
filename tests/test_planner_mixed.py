"""One mesh for each stage, chosen with its devices: against enumeration, and against every plan of equal meshes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from models import example_gpt
from parity import ADAMW

import autopar
from autopar.equal_meshes import EqualMeshes
from autopar.meshes import may_differ
from autopar.options import Options
from autopar.planner.arrangements import Arrangement, Arranger, Pool, Seat
from autopar.planner.chain import Chain
from autopar.planner.factor_graph import Factor, FactorGraph
from autopar.planner.mixed import MixedSolver, Shape
from autopar.planner.solution import Infeasible, Solution
from autopar.planner.space import ModelSpace
from autopar.planner.worthwhile import Ways, worthwhile
from autopar.planning import Job
from autopar.rescheduled import scheduled
from autopar.sites import alike, only, together
from cost_model.errors import ParallelismError
from cost_model.mesh import Mesh

SEGMENTS, COUNTS = 3, (1, 3)
MESHES = tuple(Mesh(1, tp) for tp in (1, 2, 3))


def labels_of(tp: int) -> tuple[str, ...]:
    return ("R", "S(0)", "S(1)")[:tp]


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
            time_s = rng.integers(30, 60, shape).astype(float)  # shards are no more than so many times as fast
            step_s, state, saved = (rng.integers(1, 30, shape).astype(float) for _ in range(3))
            factor = Factor(tuple(domains), time_s, step_s, state, saved)
            ends = (name if name in domains else None for name in ("in", "out"))
            kinds.append(FactorGraph(domains, (factor,), *ends, ()))
        return Chain(tuple(kinds), tuple(range(SEGMENTS)), lambda i, label: 0.0, lambda i, j: 0)

    def saving_chains(self, dp: int, tp: int, microbatch_size: int) -> Sequence[Chain]:
        return [self.chain(dp, tp, microbatch_size)]


def cut_s(mesh: Mesh, samples: int, position: int, label: str) -> float:
    """Of whole values as long on all meshes."""
    return 6.0 * position / (1 if label == "R" else mesh.tp)


class Bytes:
    """Links on which a byte takes a second there and back, and no time of the link."""

    def cut_bytes(self, mesh: Mesh, samples: int, position: int, label: str) -> float:
        return cut_s(mesh, samples, position, label)

    def hop_s(self, source: Seat, target: Seat, nbytes: float, split: bool) -> tuple[float, float]:
        return nbytes, 0.0

    def once_s(self, seats: Arrangement) -> float:
        return 0.0


def solver(seed: int, cap_bytes: float, counts: tuple[int, ...] = COUNTS) -> MixedSolver:
    firsts = (0, *itertools.accumulate(counts))
    pools = [
        Pool(tuple(range(first, first + count)), RandomSpace(seed, kind), cap_bytes)
        for kind, (first, count) in enumerate(zip(firsts, counts, strict=False))
    ]
    return MixedSolver(pools, Bytes())


def every_plan(seed: int, pp: int, microbatches: int, counts: tuple[int, ...] = COUNTS) -> list[tuple[float, float]]:
    """(objective, largest stage's bytes) of every choice of ends, meshes, devices and labels."""
    found = []
    for cuts in itertools.combinations(range(1, SEGMENTS), pp - 1):
        ranges = list(itertools.pairwise((0, *cuts, SEGMENTS)))
        for own in itertools.product(itertools.product(MESHES, range(len(counts))), repeat=pp):
            used = [sum(mesh.size for mesh, kind in own if kind == k) for k in range(len(counts))]
            if tuple(used) == counts:
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
        domains.append(labels_of(min((tp for tp in tps if tp > 1), default=1)))
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


@settings(max_examples=drawn(25), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.sampled_from([1, 4]))
def test_as_fast_as_the_fastest_of_all(seed: int, pp: int, microbatches: int) -> None:
    plans = every_plan(seed, pp, microbatches)
    shape = Shape((MESHES,) * pp, 8, microbatches, "1f1b")
    first = next(solver(seed, math.inf).fastest([shape]))
    found = first.solution
    assert isinstance(found, Solution) and found.meshes is not None and found.placement is not None
    assert found.objective_s == pytest.approx(min(plans)[0]) and found.gap == pytest.approx(0, abs=1e-9)
    assert first.bound_s <= found.objective_s * (1 + 1e-9)
    assert sorted(found.placement) == list(range(sum(COUNTS)))
    assert sum(mesh.size for mesh in found.meshes) == sum(COUNTS)


@settings(max_examples=drawn(15), deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_under_a_cap(seed: int, share: float) -> None:
    """Never over the cap nor faster than the fastest that fits; where nothing fits, the least that any plan needs."""
    plans = every_plan(seed, 2, 4)
    needs = sorted(need for _, need in plans)
    cap = needs[0] - 1 + share * (needs[-1] - needs[0])
    shape, capped = Shape((MESHES,) * 2, 8, 4, "1f1b"), solver(seed, cap)
    first = next(capped.fastest([shape]), None)
    fitting = [time_s for time_s, need in plans if need <= cap]
    if not fitting:
        short = capped.shortage([shape])
        assert first is None and isinstance(short, Infeasible) and short.needed_bytes == needs[0]
        return
    assert first is not None and (found := first.solution) is not None
    best = min(fitting)
    assert any(t == pytest.approx(found.objective_s) and need <= cap for t, need in plans)
    assert found.objective_s >= best * (1 - 1e-9) and first.bound_s <= best * (1 + 1e-9)


def test_what_cannot_fit_is_neither_solved_nor_looked_at_for_what_it_is_short_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each segment by itself needs so much: of all arrangements one is solved, and few may be short of least."""
    least = min(need for _, need in every_plan(0, 2, 4))
    shapes = [Shape((MESHES,) * 2, samples, 4, "1f1b") for samples in (2, 4, 8)]
    hopeless, looked_at = solver(0, least / 4), list[str]()
    for name in ("solve", "_short"):
        own = getattr(MixedSolver, name)

        def spied(self: MixedSolver, *given: Any, own: Any = own, name: str = name) -> Any:
            looked_at.append(name)
            return own(self, *given)

        monkeypatch.setattr(MixedSolver, name, spied)
    assert list(hopeless.fastest(shapes)) == [] and looked_at == ["solve"]
    assert hopeless.shortage(shapes[:1]) is not None
    assert 1 <= looked_at.count("_short") < hopeless.arranger.count(shapes[0].meshes)


def test_what_two_shards_cannot_send_to_three_is_no_cut() -> None:
    counts = (2, 3)
    least = min(need for _, need in every_plan(0, 2, 4, counts))
    short = solver(0, least - 1, counts).shortage([Shape((MESHES,) * 2, 8, 4, "1f1b")])
    assert isinstance(short, Infeasible) and short.needed_bytes == least


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("microbatches", [1, 8, 10**6])
def test_few_of_many_columns_are_left_and_the_best_are_among_them(seed: int, microbatches: int) -> None:
    """More than a thousand columns of each of two stages, all pairs enumerated."""
    draw, cuts, variants = np.random.default_rng(seed), 60, 24
    at = np.repeat(np.arange(1, cuts), variants)
    lengths = [(own * draw.uniform(1.0, 1.3, len(at)), draw.uniform(0, 30, len(at))) for own in (at, cuts - at)]
    there, hop_s = np.zeros_like(at), draw.uniform(0, 5, len(at))
    stages = [
        Ways(there, at, lengths[0][0], lengths[0][0], lengths[0][1]),
        Ways(at, there, lengths[1][0], lengths[1][0] + hop_s, lengths[1][1]),
    ]
    a, b = (index.ravel() for index in np.indices((len(at), len(at))))
    meet = at[a] == at[b]
    a, b = a[meet], b[meet]
    (time_a, step_a), (time_b, step_b) = ((t[i], s[i]) for (t, s), i in zip(lengths, (a, b), strict=True))
    along_s = time_a + time_b + hop_s[b] + np.maximum(step_a, step_b)
    values = along_s + (microbatches - 1) * np.maximum(time_a, time_b)
    best = int(values.argmin())
    left = worthwhile(stages, microbatches)
    assert a[best] in left.kept[0] and b[best] in left.kept[1]
    assert sum(map(len, left.kept)) <= 100 < 2 * len(at) / 10
    assert left.bound_s <= values[best] * (1 + 1e-9)


def test_of_equal_tilings_one_is_left() -> None:
    """16 stages of one or two of 24 segments: an integer program of all their columns has thousands of best choices."""
    first = np.arange(24)
    before, after = np.concatenate([first, first]), np.concatenate([first + 1, first + 2]) % 24
    seconds = np.repeat([1.0, 2.0], 24)
    left = worthwhile([Ways(before, after, seconds, seconds, 0 * seconds)] * 16, 128)
    assert list(map(len, left.kept)) == [1] * 16
    assert (
        left.bound_s == pytest.approx(24 + 127 * 2) and np.concatenate([seconds[own] for own in left.kept]).sum() == 24
    )


def test_no_meshes_that_use_all_devices() -> None:
    shapes = [Shape(((Mesh(1, 1),), (Mesh(1, 2),)), 8, 1, "1f1b")]
    none = solver(0, math.inf)
    assert list(none.fastest(shapes)) == [] and none.shortage(shapes) is None


def test_arrangements_give_each_device_to_one_stage() -> None:
    space = RandomSpace(0, 0)
    pools = [Pool((0, 1), space, 1.0), Pool((2,), space, 1.0), Pool((1, 2), space, 1.0, whole=True)]
    arranger, meshes = Arranger(pools), (tuple(Mesh(1, tp) for tp in (1, 2)),) * 2
    found = [tuple((seat.pool, seat.devices) for seat in own) for own in arranger.arrangements(meshes)]
    pair, alone, joined = (0, (0, 1)), (1, (2,)), [(0, (0,)), (2, (1, 2))]
    assert sorted(found) == sorted([(pair, alone), (alone, pair), tuple(joined), tuple(reversed(joined))])
    assert arranger.count(meshes) == len(found)


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


@pytest.mark.parametrize(("count", "kinds", "tried"), [(6, 1, True), (6, 5, True), (8, 3, True), (9, 3, False)])
def test_meshes_of_many_devices_are_not_looked_for_unasked(count: int, kinds: int, tried: bool) -> None:
    names = ("v100-sxm2-16gb", "v100-sxm2-32gb", "a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm")[:kinds]
    devices = [names[i % kinds] for i in range(count)]
    every = np.ones((count, count))
    cluster = autopar.Cluster.from_matrix(device=devices, latency_s=every, bandwidth_bytes_per_s=every)
    assert may_differ(autopar.Parallelism(), cluster) == tried


# --- Slow links


def slow_cluster() -> autopar.Cluster:
    """Two fast devices near each other, two slow ones too, and one far from all of them, from which all is slow."""
    near = np.full((5, 5), 2e9)
    near[:2, :2] = near[2:4, 2:4] = 40e9
    near[4, :4], near[:4, 4] = 2e6, 4e8
    delay_s = np.where(near < 1e9, 0.05, 1e-4)
    devices = ["a100-sxm-40gb"] * 2 + ["v100-sxm2-16gb"] * 3
    return autopar.Cluster.from_matrix(device=devices, latency_s=delay_s, bandwidth_bytes_per_s=near)


def test_devices_that_nothing_tells_apart() -> None:
    cluster = slow_cluster()
    groups = alike(cluster)
    assert groups == [(0, 1), (2, 3), (4,)]
    sets = together(cluster, groups, 1e6)
    assert (2, 3, 4) in sets and (4, 2, 3) not in groups and all(len(own) < 5 for own in sets)
    assert only(cluster, (2, 3, 4)).network.bandwidths[2, 0] == 2e6  # type: ignore[union-attr]


def slow_job(cluster: autopar.Cluster) -> Job:
    model, _ = example_gpt(n_layer=4, n_embd=1024, vocab_size=512, block_size=512)
    tokens = torch.zeros(40, 512, dtype=torch.int64)
    batch = {"idx": tokens, "targets": tokens}
    return Job.of(model, cluster, batch, Options.of(None, ADAMW, autopar.Parallelism(), None, None, None))


def test_slow_links_are_priced_as_they_are_simulated() -> None:
    """A device that is far from all others repeats what some of them do, which no equal meshes can; the search's price
    is that of the simulated step."""
    job = slow_job(slow_cluster())
    found = job.solve()
    step_s = job.step_s(scheduled(job, found).plan)
    equal = job._searched_alike(job.pins(None))
    assert isinstance(equal, Solution) and found.meshes is not None
    assert step_s < 0.7 * job.step_s(scheduled(job, equal).plan)
    assert found.objective_s == pytest.approx(step_s, rel=0.1)


def test_searches_under_other_caps_ask_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits: what would is that of the meshes that need least, and chains are made once for all caps."""
    job, made = slow_job(slow_cluster()), list[object]()
    own = ModelSpace._chain
    monkeypatch.setattr(ModelSpace, "_chain", lambda space, *given: made.append(given) or own(space, *given))
    hopeless = job.under(job.options.parallelism, 2**20)
    found, alike = hopeless._searched(), hopeless._searched_alike(job.pins(None))
    assert isinstance(found, Infeasible) and isinstance(alike, Infeasible)
    assert found.needed_bytes < alike.needed_bytes and found.meshes is not None
    first = len(made)
    again = job.under(job.options.parallelism, 2**21)._searched()
    assert isinstance(again, Infeasible) and again.needed_bytes == found.needed_bytes
    assert first > 0 and len(made) == first


def test_shards_that_divide_nothing_exchange_nothing() -> None:
    """What five shards could divide of a GPT they have to exchange over a slow link: the price of five that repeat
    everything is that of one device, and their plan is found."""
    slow = np.full((5, 5), 2e6)
    cluster = autopar.Cluster.from_matrix(
        device=["v100-sxm2-16gb"] * 5, latency_s=np.full((5, 5), 1e-4), bandwidth_bytes_per_s=slow + np.arange(5)
    )
    job = slow_job(cluster)
    equal = EqualMeshes(job, job.pins(None))
    found = equal.fastest()
    assert isinstance(found, Solution) and (found.configuration.tp, found.configuration.pp) == (5, 1)
    assert equal.price_s == pytest.approx(job.step_s(scheduled(job, found).plan), rel=0.1)
