"""Ranks that share cores: by hand, moment by moment, and as the planner counts them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import Cluster, Device, collective, op, pipeline, program, stage_program

from autopar.planner.bounds import Objective
from cost_model.prices import price_replicas
from cost_model.program import Program
from cost_model.shared_cores import pipeline_passes, shared_clock
from cost_model.simulate import SimulationResult, simulate, step_time_s


def shared(what: Program, crowding: float) -> SimulationResult:
    return simulate(what, Cluster((Device(),) * what.num_devices, crowding=crowding))


def test_one_rank_at_a_time_is_as_fast_as_it_is_alone() -> None:
    """One microbatch through four stages, of which each has all cores it can use."""
    what = pipeline("1f1b", 1, [(1.0, 2.0)] * 4)
    assert [shared(what, crowding).step_time_s for crowding in (1.0, 2.0, 4.0)] == [12.0, 6.0, 3.0]


def test_as_many_ranks_as_cores_never_wait_for_one() -> None:
    """Two stages of which one waits while the pipeline fills and drains: the other has its core meanwhile, so that the
    step takes what all of its work takes on all cores."""
    for schedule, microbatches in itertools.product(("gpipe", "1f1b"), (1, 2, 5)):
        what = pipeline(schedule, microbatches, [(1.0, 2.0)] * 2)
        assert shared(what, 2.0).step_time_s == pytest.approx(3.0 * microbatches, rel=1e-12)


def test_a_step_in_which_none_waits_takes_its_price() -> None:
    what = program([stage_program(0, 1, [op(1.0)], [op(2.0)], [collective("dp")])], 3, "1f1b", dp=4)
    alone, crowded = (shared(what, crowding) for crowding in (1.0, 2.0))
    assert crowded == alone


@pytest.mark.parametrize("crowding", [1.0, 1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize(("pp", "microbatches"), [(1, 3), (2, 1), (3, 4), (4, 2), (4, 9)])
def test_equal_stages_take_what_the_planner_counts(pp: int, microbatches: int, crowding: float) -> None:
    """A forward and a backward that are as long: then all stages move in step, and the sum over moments is exact."""
    what = pipeline("gpipe", microbatches, [(2.0, 2.0)] * pp)
    passes = pipeline_passes(pp, microbatches, crowding)
    assert shared(what, crowding).step_time_s == pytest.approx(4.0 * passes, rel=1e-12)
    objective = Objective(pp, microbatches, 1.0, crowding)
    assert objective.waiting * pp + objective.slowest == pytest.approx(passes, rel=1e-12)
    assert objective.waiting + objective.slowest == pytest.approx(objective.lone, rel=1e-12)


@pytest.mark.parametrize("pp", [1, 2, 5])
def test_with_a_core_each_the_planner_counts_as_ever(pp: int) -> None:
    plain = Objective(pp, 7, 1 / 3)
    assert (plain.waiting, plain.slowest, plain.lone) == (1 / 3, 7 - 1 / 3, 7.0)


uneven = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@given(times=uneven, microbatches=st.integers(1, 5), crowding=st.floats(1.0, 8.0), dp=st.integers(1, 3))
def test_no_step_is_faster_than_its_work_or_than_each_rank_alone(
    times: list[tuple[int, int]], microbatches: int, crowding: float, dp: int
) -> None:
    stages = [stage_program(i, len(times), [op(f)], [op(b)]) for i, (f, b) in enumerate(times)]
    what = program(stages, microbatches, "1f1b", dp=dp)
    alone, crowded = shared(what, 1.0), shared(what, crowding)
    work_s = microbatches * sum(f + b for f, b in times) / len(times)
    assert crowded.step_time_s <= alone.step_time_s * (1 + 1e-12)
    assert crowded.step_time_s >= max(work_s, alone.step_time_s / crowding) * (1 - 1e-12)
    assert crowded.breakdown.total_s == pytest.approx(crowded.step_time_s, rel=1e-12)
    assert min(crowded.breakdown.compute_s, crowded.breakdown.bubble_s) >= 0.0
    assert max(event.end_s for event in crowded.timeline) == pytest.approx(crowded.step_time_s, rel=1e-12)
    order = [[(e.stage, e.name, e.microbatch) for e in found.timeline] for found in (alone, crowded)]
    assert order[0] == order[1]
    prices = price_replicas(what, Cluster((Device(),) * what.num_devices))
    assert step_time_s(what, prices, crowding=crowding) == crowded.step_time_s
    limit_s = crowded.step_time_s * (1 + 1e-9)
    assert step_time_s(what, prices, crowding=crowding, limit_s=limit_s) == crowded.step_time_s


def pairs(moments: list[int]) -> list[tuple[float, float]]:
    ordered = map(float, sorted(moments))
    return list(zip(ordered, ordered, strict=False))


spans = st.lists(st.integers(0, 40), unique=True, max_size=8).map(pairs)


@given(
    waits=st.lists(st.tuples(st.integers(1, 3), spans), min_size=1, max_size=4),
    crowding=st.sampled_from([1.0, 1.5, 2.0, 5.0]),
)
def test_every_moment_passes_as_fast_as_its_ranks_have_cores(
    waits: list[tuple[int, list[tuple[float, float]]]], crowding: float
) -> None:
    """Moment by moment: the ranks that compute share all cores, none has more than one; nobody hastens waiting."""
    clock, everyone = shared_clock(waits, 41.0, crowding), sum(ranks for ranks, _ in waits)
    passed = 0.0
    for moment in range(41):
        assert clock(float(moment)) == pytest.approx(passed, rel=1e-12, abs=1e-12)
        waiting = sum(ranks for ranks, own in waits for start, stop in own if start <= moment < stop)
        passed += max((everyone - waiting) / everyone, 1 / crowding) if waiting < everyone else 1.0
    for _, own in waits:
        assert clock.length_s(own) == pytest.approx(sum(clock(b) - clock(a) for a, b in own), abs=1e-9)
