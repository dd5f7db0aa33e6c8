"""The least that chains cost, and floors of chains that are not made, against the chains."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from effort import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from models import example_gpt
from parity import ADAMW
from random_spaces import plans_of, random_kind

from autopar.options import Options
from autopar.planner.bounds import TIME_ONLY
from autopar.planner.chain import Chain, Floor
from autopar.planner.configuration import Configuration
from autopar.planner.configuration_solver import ConfigurationSolver
from autopar.planner.least import floors_s, least_costs, most_whole_s, quick_bound_s, slowest_stage_s
from autopar.planner.search import _floor_s
from autopar.planner.segment import Price, Segment
from autopar.planner.space import ModelSpace
from autopar.planning import Job
from cost_model.cluster import Cluster
from cost_model.device import Device
from cost_model.device_rows import StreamRow
from cost_model.parallelism import Parallelism

TIME = Price(*TIME_ONLY)


@settings(max_examples=drawn(50), deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 20))
def test_the_product_of_a_row_is_that_from_left_to_right(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    segments = [Segment(random_kind(rng, True, True, False, True)) for _ in range(3)]
    row = tuple(int(kind) for kind in rng.integers(0, 3, length))
    prices = (TIME, Price(1.0, 0.5, 0.1, 0.2))
    for price, found in zip(prices, least_costs(row, segments, prices), strict=True):
        costs = [segments[kind].solve((price,))[0].cost for kind in row]
        whole = functools.reduce(lambda a, b: (a[:, :, None] + b[None]).min(axis=1), costs)
        assert found == pytest.approx(whole.min())


@functools.cache
def space(cluster: str) -> ModelSpace:
    model, inputs = example_gpt(n_layer=3, n_embd=512)
    options = Options.of(None, ADAMW, Parallelism(), None, None, None)
    return Job.of(model, Cluster.load(cluster, 32), inputs, options).space


def least_s(known: ModelSpace, dp: int, tp: int, size: int) -> float:
    chain = known.chain(dp, (tp,), size)
    assert chain is not None
    return float(least_costs(chain.sequence, [Segment(graph) for graph in chain.kinds], (TIME,))[0])


def assert_alike(known: ModelSpace, floor: Floor, dp: int, tp: int, size: int) -> None:
    """Of each kind of segments that repeats as many as there are, none of which takes less."""
    chain = known.chain(dp, (tp,), size)
    assert chain is not None and floor.alike
    counts = Counter(chain.sequence)
    repeated = [(kind, count) for kind, count in counts.items() if count > 1]
    for (count, each_s), (kind, known_count) in zip(floor.alike, repeated, strict=True):
        least_s = float(Segment(chain.kinds[kind]).costs((TIME,)).min())
        assert count == known_count and 0.0 < each_s <= least_s * (1 + 1e-9), (dp, tp, size)


@pytest.mark.parametrize("cluster", ["p3.16xlarge", "dgx-a100-80gb", "a64fx"])
def test_no_chain_goes_below_its_floors(cluster: str) -> None:
    """Nor below those that follow from fewer ranks, in whatever order meshes are asked for."""
    whole = space(cluster).traced.global_graph.batch
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    for dp, tp, size in itertools.product((1, 2), (16, 2, 8, 4, 1), sizes):
        time_s, floors_s = least_s(space(cluster), dp, tp, size), [-1.0]
        for _ in range(2):
            floor = space(cluster).floor(dp, (tp,), size, floors_s[-1])
            assert floor is not None and floor.segments == len(space(cluster).structure.segments)
            floors_s.append(floor.time_s)
            assert_alike(space(cluster), floor, dp, tp, size)
        assert floors_s[1] <= floors_s[2] <= time_s * (1 + 1e-9), (dp, tp, size)
        assert floors_s[2] > 0.3 * time_s, (dp, tp, size)


def test_no_assignment_saves_less_than_is_known_before_the_chain() -> None:
    known = space("dgx-a100-80gb")
    for dp, tp, size in itertools.product((1, 2), (8, 1, 4), (1, 2)):
        chain = known.chain(dp, (tp,), size)
        assert chain is not None
        segments = [Segment(graph) for graph in chain.kinds]
        least = float(least_costs(chain.sequence, segments, (Price(0.0, 0.0, 0.0, 1.0),))[0])
        assert 0.5 * least < known.least_saved_bytes(dp, (tp,), size) <= least * (1 + 1e-9)


@settings(max_examples=drawn(100), deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 9), pp=st.integers(1, 9))
def test_the_slowest_stage_is_that_of_the_best_of_all_tilings(seed: int, length: int, pp: int) -> None:
    """Where segments that follow each other need not agree; else no tiling is faster."""
    rng = np.random.default_rng(seed)
    segments = [Segment(random_kind(rng, True, True, False, True)) for _ in range(3)]
    row = tuple(int(kind) for kind in rng.integers(0, 3, length))
    alone = [float(segment.costs((TIME,)).min()) for segment in segments]
    times = [alone[kind] for kind in row]
    pp = min(pp, length)
    tilings = ((0, *cuts, length) for cuts in itertools.combinations(range(1, length), pp - 1))
    least = min(max(sum(times[a:b]) for a, b in itertools.pairwise(ends)) for ends in tilings)
    graphs = tuple(segment.graph for segment in segments)
    found = slowest_stage_s(Chain(graphs, row, lambda i, label: 0.0, lambda i, j: 0), segments, pp)
    assert found <= least * (1 + 1e-9) and found == pytest.approx(least, rel=1e-5)


@settings(max_examples=drawn(60), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(0, 2),
    pp=st.integers(1, 4),
    microbatches=st.integers(1, 8),
    schedule=st.sampled_from(["1f1b", "gpipe", "zero_bubble"]),
    crowding=st.sampled_from([1.0, 1.0, 1.5, 4.0]),
)
def test_no_plan_is_faster_than_is_known_before_ranges_are_priced(
    seed: int, blocks: int, pp: int, microbatches: int, schedule: str, crowding: float
) -> None:
    """By floors and quick bounds; nor one that fits than glances under a cap say."""
    rng, row = np.random.default_rng(seed), (0, *[1] * blocks, 2)
    tied, step_times = blocks < 2 and bool(rng.integers(2)), float(rng.choice([0.1, 1.0, 100.0]))
    shapes = ((False, True, tied), (True, True, False), (True, False, tied))
    kinds = [random_kind(rng, *shape, True) for shape in shapes]
    long = (
        tuple(replace(f, step_s=f.step_s if f.step_s is None else f.step_s * step_times) for f in k.factors)
        for k in kinds
    )
    graphs = tuple(replace(kind, factors=factors) for kind, factors in zip(kinds, long, strict=True))
    chain = Chain(graphs, row, lambda i, label: float(i), lambda i, j: 3 * (j - i))
    c = Configuration(1, 1, min(pp, len(row)), schedule, 1, microbatches, crowding=crowding)
    plans = plans_of(chain, c)
    segments, best_s = [Segment(graph) for graph in graphs], min(plans)[0] * (1 + 1e-9)
    cap = float(rng.choice([need for _, need in plans]))
    solver = ConfigurationSolver(chain, segments, c, cap, hints_s=tuple(rng.uniform(0, 3, 2)))
    floors = floors_s(
        [str(kind) for kind in row], {str(kind): replace(graphs[kind], shared=()) for kind in sorted(set(row))}
    )
    alike = tuple(zip((row.count(kind) for kind in sorted(set(row))), floors[1:].tolist(), strict=True))
    assert _floor_s(c, Floor(len(row), float(floors[0]), alike)) <= best_s
    assert quick_bound_s(chain, segments, c.objective) <= best_s and solver.quick_bound_s() <= best_s
    assert solver.glance_s() <= min(time_s for time_s, need in plans if need <= cap) * (1 + 1e-9)


def test_whole_segments_are_counted_by_kind() -> None:
    assert most_whole_s([(48, 1.0), (2, 7.0)], 32) == 7.0
    assert most_whole_s([(48, 4.0), (2, 7.0)], 32) == 8.0
    assert most_whole_s([], 4) == 0.0


def test_a_device_whose_large_ops_are_slower_says_by_how_much() -> None:
    assert StreamRow(((1e3, 2e9), (1e6, 8e9), (1e9, 4e9), (1e10, 5e9)), 0.0).slowing == 2.0
    assert Device.load("a100-sxm-80gb").slowing == 1.0
