"""Schedules: who runs what when, and that no order can hang."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.errors import ParallelismError, UnknownNameError, VerificationError
from cost_model.schedule import (
    Backward,
    Forward,
    PostBackward,
    PostForward,
    RecvBackward,
    RecvForward,
    SendBackward,
    SendForward,
    Step,
    Weight,
    in_flight,
    splits_backward,
    stage_schedule,
)
from cost_model.schedule_check import Guarantee, check_schedule

SCHEDULES = st.sampled_from(("gpipe", "1f1b", "zero_bubble"))
SHORT = {
    Forward: "F",
    Backward: "B",
    SendForward: "sF",
    PostForward: "pF",
    RecvForward: "rF",
    SendBackward: "sB",
    PostBackward: "pB",
    RecvBackward: "rB",
    Weight: "W",
}


def text(steps: tuple[Step, ...], posts: bool = False) -> str:
    """ "F2" is of microbatch 2, "F2/1" the same in chunk 1."""
    shown = (s for s in steps if posts or not isinstance(s, PostForward | PostBackward))
    return " ".join(f"{SHORT[type(s)]}{s.microbatch}{f'/{s.chunk}' if s.chunk else ''}" for s in shown)


def stages(schedule: str, pp: int, microbatches: int, virtual_stages: int = 1) -> list[tuple[Step, ...]]:
    return [stage_schedule(schedule, stage, pp, microbatches, virtual_stages) for stage in range(pp)]


def test_gpipe_text() -> None:
    assert [text(steps) for steps in stages("gpipe", 2, 2)] == [
        "F0 sF0 F1 sF1 rB0 B0 rB1 B1",
        "rF0 F0 rF1 F1 B0 sB0 B1 sB1",
    ]


def test_1f1b_text() -> None:
    assert [text(steps) for steps in stages("1f1b", 3, 4)] == [
        "F0 sF0 F1 sF1 F2 sF2 rB0 B0 F3 sF3 rB1 B1 rB2 B2 rB3 B3",
        "rF0 F0 sF0 rF1 F1 sF1 rB0 B0 sB0 rF2 F2 sF2 rB1 B1 sB1 rF3 F3 sF3 rB2 B2 sB2 rB3 B3 sB3",
        "rF0 F0 B0 sB0 rF1 F1 B1 sB1 rF2 F2 B2 sB2 rF3 F3 B3 sB3",
    ]


def test_zero_bubble_text() -> None:
    """Qi et al., 2023, figure 3 above, with three stages; the first stage's backwards are whole."""
    assert [text(steps) for steps in stages("zero_bubble", 3, 4)] == [
        "F0 sF0 F1 sF1 F2 sF2 rB0 B0 F3 sF3 rB1 B1 rB2 B2 rB3 B3",
        "rF0 F0 sF0 rF1 F1 sF1 rB0 B0 sB0 rF2 F2 sF2 rB1 B1 sB1 W0 rF3 F3 sF3 rB2 B2 sB2 W1 rB3 B3 sB3 W2 W3",
        "rF0 F0 B0 sB0 rF1 F1 B1 sB1 rF2 F2 B2 sB2 W0 rF3 F3 B3 sB3 W1 W2 W3",
    ]


def test_a_weight_block_that_is_missing_or_early() -> None:
    for change in (lambda steps: steps.remove(Weight(1)), lambda steps: steps.insert(0, steps.pop())):
        lists = [list(steps) for steps in stages("zero_bubble", 2, 2)]
        change(lists[1])
        assert failing_check(lists, 2) == "schedule_complete"


def test_interleaved_text() -> None:
    """Narayanan et al., 2021, figure 4, with two stages: each microbatch passes both stages twice."""
    assert [text(steps) for steps in stages("interleaved", 2, 2, 2)] == [
        "F0 sF0 F1 sF1 rF0/1 F0/1 sF0/1 rF1/1 F1/1 sF1/1 rB0/1 B0/1 sB0/1 rB1/1 B1/1 sB1/1 rB0 B0 rB1 B1",
        "rF0 F0 sF0 rF1 F1 sF1 rF0/1 F0/1 B0/1 sB0/1 rF1/1 F1/1 B1/1 sB1/1 rB0 B0 sB0 rB1 B1 sB1",
    ]
    computed = [
        " ".join(text((step,)) for step in steps if isinstance(step, Forward | Backward))
        for steps in stages("interleaved", 2, 4, 2)
    ]
    assert computed == [
        "F0 F1 F0/1 F1/1 F2 B0/1 F3 B1/1 F2/1 B0 F3/1 B1 B2/1 B3/1 B2 B3",
        "F0 F1 F0/1 B0/1 F1/1 B1/1 F2 B0 F3 B1 F2/1 B2/1 F3/1 B3/1 B2 B3",
    ]


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 3))
def test_interleaved_schedules_are_safe(pp: int, virtual_stages: int, rounds: int) -> None:
    lists = stages("interleaved", pp, rounds * pp, virtual_stages)
    assert check_schedule(lists, rounds * pp, virtual_stages) is Guarantee.ASYNCHRONOUS
    for stage, steps in enumerate(lists):
        alive = most = 0
        for step in steps:
            alive += (type(step) is Forward) - (type(step) is Backward)
            most = max(most, alive)
        assert most == in_flight("interleaved", stage, pp, rounds * pp, virtual_stages)


@pytest.mark.parametrize(
    ("schedule", "pp", "microbatches", "virtual_stages", "message"),
    [
        ("interleaved", 4, 6, 2, "a multiple of pp=4 microbatches, not 6; change microbatch_size"),
        ("interleaved", 1, 4, 2, "at least 2 stages of at least 2 virtual stages, not pp=1"),
        ("interleaved", 4, 4, 1, "at least 2 virtual stages, not pp=4 with virtual_stages=1"),
        ("1f1b", 4, 4, 2, "schedule='1f1b' has one virtual stage on each stage, not 2"),
    ],
)
def test_counts_that_a_schedule_cannot_run(
    schedule: str, pp: int, microbatches: int, virtual_stages: int, message: str
) -> None:
    with pytest.raises(ParallelismError, match=message):
        stage_schedule(schedule, 0, pp, microbatches, virtual_stages)


def test_receives_are_posted_before_the_block_before() -> None:
    """One at a time on each channel; the first where nothing runs before it."""
    assert [text(steps, posts=True) for steps in stages("1f1b", 2, 3)] == [
        "F0 sF0 pB0 F1 sF1 rB0 B0 pB1 F2 sF2 rB1 pB2 B1 rB2 B2",
        "pF0 rF0 F0 pF1 B0 sB0 rF1 F1 pF2 B1 sB1 rF2 F2 B2 sB2",
    ]


def test_one_stage_sends_nothing_and_1f1b_keeps_one_microbatch() -> None:
    assert text(stage_schedule("1f1b", 0, 1, 2)) == "F0 B0 F1 B1"
    assert text(stage_schedule("gpipe", 0, 1, 2)) == "F0 F1 B0 B1"


@given(SCHEDULES, st.integers(1, 6), st.integers(1, 9))
def test_generated_schedules_are_safe(schedule: str, pp: int, microbatches: int) -> None:
    guarantee = check_schedule(stages(schedule, pp, microbatches), microbatches)
    if schedule == "gpipe":
        assert guarantee is Guarantee.RENDEZVOUS


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 5))
def test_windows_are_safe_and_keep_their_messages_under_way(pp: int, microbatches: int, window: int) -> None:
    """No more than a window of receives is posted on a channel, and no more microbatches are held than said."""
    lists = [stage_schedule("1f1b", stage, pp, microbatches, window=window) for stage in range(pp)]
    assert check_schedule(lists, microbatches, window=window) is not None
    for stage, steps in enumerate(lists):
        posted = [0, 0]
        alive = most = 0
        for step in steps:
            posted[0] += (type(step) is PostForward) - (type(step) is RecvForward)
            posted[1] += (type(step) is PostBackward) - (type(step) is RecvBackward)
            assert max(posted) <= window
            alive += (type(step) is Forward) - (type(step) is Backward)
            most = max(most, alive)
        assert most == in_flight("1f1b", stage, pp, microbatches, window=window)
        assert most == min(1 + window * (pp - 1 - stage), microbatches)
        for kind in (PostForward, PostBackward):
            order = [step.microbatch for step in steps if type(step) is kind]
            assert order == sorted(order)


def test_a_window_of_two_in_text() -> None:
    assert [text(stage_schedule("1f1b", stage, 2, 4, window=2), posts=True) for stage in range(2)] == [
        "pB0 F0 sF0 F1 sF1 pB1 F2 sF2 rB0 pB2 B0 F3 sF3 rB1 pB3 B1 rB2 B2 rB3 B3",
        "pF0 pF1 rF0 F0 pF2 B0 sB0 rF1 F1 pF3 B1 sB1 rF2 F2 B2 sB2 rF3 F3 B3 sB3",
    ]


def test_1f1b_needs_asynchronous_sends() -> None:
    assert check_schedule(stages("1f1b", 2, 2), 2) is Guarantee.ASYNCHRONOUS


@given(SCHEDULES, st.integers(1, 6), st.integers(1, 9))
def test_in_flight_is_what_the_steps_hold(schedule: str, pp: int, microbatches: int) -> None:
    for stage in range(pp):
        alive = most = 0
        for step in stage_schedule(schedule, stage, pp, microbatches):
            alive += type(step) is Forward
            most = max(most, alive)
            alive -= type(step) is (Weight if splits_backward(schedule, stage) else Backward)
        assert most == in_flight(schedule, stage, pp, microbatches)
        assert most <= {"gpipe": microbatches, "1f1b": pp - stage, "zero_bubble": pp}[schedule]


def failing_check(lists: list[list[Step]], microbatches: int) -> str:
    with pytest.raises(VerificationError) as caught:
        check_schedule(lists, microbatches)
    return caught.value.check


def test_missing_receive() -> None:
    lists = [list(steps) for steps in stages("gpipe", 2, 2)]
    lists[1].remove(RecvForward(1))
    assert failing_check(lists, 2) == "schedule_complete"


def test_duplicate_send() -> None:
    lists = [list(steps) for steps in stages("gpipe", 2, 2)]
    lists[0].append(SendForward(1))
    assert failing_check(lists, 2) == "schedule_complete"


def test_microbatch_that_does_not_exist() -> None:
    lists = [list(steps) for steps in stages("gpipe", 2, 2)]
    assert failing_check(lists, 1) == "schedule_complete"


def test_backward_before_its_forward() -> None:
    assert failing_check([[Backward(0), Forward(0)]], 1) == "schedule_complete"


def test_send_before_its_forward() -> None:
    lists = [list(steps) for steps in stages("gpipe", 2, 1)]
    first, send = lists[0].index(Forward(0)), lists[0].index(SendForward(0))
    lists[0][first], lists[0][send] = lists[0][send], lists[0][first]
    assert failing_check(lists, 1) == "schedule_complete"


def test_receives_in_another_order_than_sends() -> None:
    lists = [list(steps) for steps in stages("gpipe", 2, 2)]
    kinds = (PostForward, RecvForward, Forward)
    lists[1] = [type(step)(1 - step.microbatch) if isinstance(step, kinds) else step for step in lists[1]]
    assert failing_check(lists, 2) == "schedule_matching"


def test_gradient_sends_in_another_order_than_receives() -> None:
    lists = [list(steps) for steps in stages("gpipe", 2, 2)]
    kinds = (PostBackward, RecvBackward, Backward)
    lists[0] = [type(step)(1 - step.microbatch) if isinstance(step, kinds) else step for step in lists[0]]
    assert failing_check(lists, 2) == "schedule_matching"


def test_stages_that_wait_for_each_other() -> None:
    first: list[Step] = [Forward(0), PostBackward(0), RecvBackward(0), SendForward(0), Backward(0)]
    last: list[Step] = [PostForward(0), RecvForward(0), Forward(0), Backward(0), SendBackward(0)]
    assert failing_check([first, last], 1) == "schedule_deadlock"


@pytest.mark.parametrize(("microbatches", "safe"), [(3, True), (4, False)])
def test_one_stage_too_far_ahead(microbatches: int, safe: bool) -> None:
    """gpipe before 1f1b: the send of microbatch 3 waits for 2, which waits for a gradient nobody takes."""
    lists = [list(stage_schedule(name, i, 2, microbatches)) for i, name in enumerate(("gpipe", "1f1b"))]
    if safe:
        assert check_schedule(lists, microbatches) is Guarantee.ASYNCHRONOUS
    else:
        assert failing_check(lists, microbatches) == "schedule_deadlock"


def test_names_that_are_not_known() -> None:
    with pytest.raises(UnknownNameError, match="did you mean '1f1b'"):
        in_flight("1f1", 0, 2, 2)
