"""What holds of every simulated step, whatever its times: Hypothesis draws them."""

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import collective, issue, op, pipeline, program, run, stage_program

from cost_model.schedule import (
    Backward,
    Forward,
    PostBackward,
    PostForward,
    RecvBackward,
    RecvForward,
    SendBackward,
    SendForward,
    stage_schedule,
)

SECONDS = st.integers(0, 8).map(float)
TIMES = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=5)
SCHEDULES = st.sampled_from(("gpipe", "1f1b"))


def longest_path_s(
    schedule: str, microbatches: int, times: Sequence[tuple[float, float]], transfer_s: float, blocking: bool
) -> float:
    """The step time as a fixed point: relax the end of every step until none moves."""
    pp = len(times)
    lists = [stage_schedule(schedule, stage, pp, microbatches) for stage in range(pp)]
    ends: dict[tuple[int, object], float] = {}
    called: dict[tuple[int, object], float] = {}
    peers = {RecvForward: (SendForward, -1), RecvBackward: (SendBackward, 1)}
    receives = {SendForward: (RecvForward, 1), SendBackward: (RecvBackward, -1)}
    posts = {PostForward: RecvForward, PostBackward: RecvBackward}

    def arrival(stage: int, step: RecvForward | RecvBackward) -> float:
        sender, offset = peers[type(step)]
        posted = ends.get((stage + offset, sender(step.microbatch)), 0.0)
        return max(posted, called.get((stage, step), 0.0)) + transfer_s

    def end_of(stage: int, step: Forward | Backward, before: float) -> float:
        kind = type(step)
        if kind in posts:
            if not blocking:
                called[stage, posts[kind](step.microbatch)] = before
            return before
        if kind in peers:
            if blocking:
                called[stage, step] = before
            return max(before, arrival(stage, step))
        if kind in receives:
            receiver, offset = receives[kind]
            earlier = step.microbatch > 0
            return max(before, arrival(stage + offset, receiver(step.microbatch - 1)) if earlier else 0.0)
        return before + times[stage][kind is Backward]

    for _ in range(2 * pp * microbatches + 2 * pp + 4):
        for stage, steps in enumerate(lists):
            before = 0.0
            for step in steps:
                before = ends[stage, step] = end_of(stage, step, before)
    return max(ends.values())


@given(SCHEDULES, st.integers(1, 5), TIMES, SECONDS, st.booleans())
def test_step_time_is_the_longest_path(
    schedule: str, microbatches: int, times: list[tuple[float, float]], transfer_s: float, blocking: bool
) -> None:
    result = run(pipeline(schedule, microbatches, times), transfer_s, blocking=blocking)
    assert result.step_time_s == longest_path_s(schedule, microbatches, times, transfer_s, blocking)


@given(SCHEDULES, st.integers(1, 5), TIMES, SECONDS)
def test_receives_posted_early_cost_nothing(
    schedule: str, microbatches: int, times: list[tuple[float, float]], transfer_s: float
) -> None:
    what = pipeline(schedule, microbatches, times)
    assert run(what, transfer_s).step_time_s <= run(what, transfer_s, blocking=True).step_time_s


@given(SCHEDULES, st.integers(1, 5), TIMES, SECONDS, SECONDS)
def test_parts_sum_and_no_stage_beats_its_own_work(
    schedule: str, microbatches: int, times: list[tuple[float, float]], transfer_s: float, optimizer_s: float
) -> None:
    """A stage's busy seconds, by kind, are what its step is made of besides waiting."""
    pp = len(times)
    stages = [
        stage_program(i, pp, [op(f), issue(collective("tp"))], [op(b)], [collective("dp")], optimizer_s)
        for i, (f, b) in enumerate(times)
    ]
    result = run(program(stages, microbatches, schedule, dp=2, tp=2), transfer_s)
    assert result.breakdown.total_s == pytest.approx(result.step_time_s, rel=1e-12)
    assert all(part >= 0 for part in dataclasses.astuple(result.breakdown))
    for stage in result.stages:
        assert sum(stage.op_kinds_s.values()) <= result.step_time_s
    assert result.breakdown.communication_s + result.breakdown.bubble_s <= result.step_time_s


@given(SCHEDULES, st.integers(1, 5), TIMES, SECONDS, st.data())
def test_a_slower_op_never_makes_a_faster_step(
    schedule: str, microbatches: int, times: list[tuple[float, float]], transfer_s: float, data: st.DataObject
) -> None:
    slower = list(times)
    stage = data.draw(st.integers(0, len(times) - 1))
    slower[stage] = (times[stage][0] + data.draw(SECONDS), times[stage][1] + data.draw(SECONDS))
    before = run(pipeline(schedule, microbatches, times), transfer_s).step_time_s
    assert run(pipeline(schedule, microbatches, slower), transfer_s).step_time_s >= before


@given(SCHEDULES, st.integers(1, 5), TIMES, SECONDS)
def test_a_rank_does_one_thing_at_a_time(
    schedule: str, microbatches: int, times: list[tuple[float, float]], transfer_s: float
) -> None:
    result = run(pipeline(schedule, microbatches, times), transfer_s, blocking=True)
    for stage in range(len(times)):
        own = [e for e in result.timeline if e.stage == stage and e.stream in ("compute", "receive")]
        assert all(before.end_s <= after.start_s for before, after in zip(own, own[1:], strict=False))
