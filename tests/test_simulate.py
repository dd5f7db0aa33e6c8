"""The simulator against schedules worked by hand."""

import dataclasses
import itertools
from dataclasses import replace

import pytest
from effort import paced_s
from hypothesis import given
from hypothesis import strategies as st
from simulated import (
    Cluster,
    Device,
    collective,
    interleaved,
    issue,
    op,
    pipeline,
    program,
    run,
    spans,
    stage_program,
    zero_bubble,
)

from cost_model.axis_groups import axis_groups
from cost_model.egress import Egress
from cost_model.errors import UnknownNameError, VerificationError
from cost_model.plan import Plan, StagePlan
from cost_model.prices import price_replicas, price_stages
from cost_model.program import Program
from cost_model.rank_clock import Event
from cost_model.replicas import slowest_first
from cost_model.schedule import (
    stage_schedule,
)
from cost_model.simulate import chrome_trace, estimate_of, simulate, step_time_s


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "microbatches"), [(1, 4), (3, 4), (4, 2), (2, 7)])
def test_equal_stages_without_transfers(schedule: str, pp: int, microbatches: int) -> None:
    """(m + p - 1)(f + b), of which (p - 1)(f + b) is bubble: Huang et al., 2019, "GPipe"."""
    result = run(pipeline(schedule, microbatches, [(1.0, 2.0)] * pp))
    assert result.step_time_s == (microbatches + pp - 1) * 3.0
    assert result.breakdown.bubble_s == (pp - 1) * 3.0
    assert result.breakdown.compute_s == microbatches * 3.0


@pytest.mark.parametrize(("pp", "virtual_stages", "microbatches"), [(2, 2, 2), (2, 4, 6), (4, 2, 8), (4, 3, 4)])
def test_interleaving_divides_the_bubble(pp: int, virtual_stages: int, microbatches: int) -> None:
    """(p - 1)(f + b) / v, a share of (p - 1) / (v m) of the computing: Narayanan et al., 2021, 2.2."""
    result = run(interleaved(pp, virtual_stages, microbatches, 4 * 3.0, 8 * 3.0))
    parts = result.breakdown
    assert parts.compute_s == microbatches * 36.0
    assert parts.bubble_s / parts.compute_s == pytest.approx((pp - 1) / (virtual_stages * microbatches), rel=1e-12)


@pytest.mark.parametrize(("pp", "microbatches"), [(2, 2), (3, 4), (4, 8), (4, 4)])
@pytest.mark.parametrize(("forward_s", "backward_s", "weight_s"), [(1.0, 1.0, 1.0), (4.0, 5.0, 3.0)])
def test_weight_blocks_fill_the_bubble(
    pp: int, microbatches: int, forward_s: float, backward_s: float, weight_s: float
) -> None:
    """(p - 1)(f + b - w) of bubble, where 1f1b has (p - 1)(f + b + w): Qi et al., 2023, table 1, ZB-H1."""
    result = run(zero_bubble(pp, microbatches, forward_s, backward_s, weight_s))
    compute_s = microbatches * (forward_s + backward_s + weight_s)
    assert result.step_time_s == compute_s + (pp - 1) * (forward_s + backward_s - weight_s)
    assert all(stage.backward_s == backward_s + weight_s for stage in result.stages)


def test_zero_bubble_of_three_stages_by_hand() -> None:
    """F B W of 1 each; stage 0 has B and W in one."""
    result = run(zero_bubble(3, 3, 1.0, 1.0, 1.0))
    assert spans(result, 2, "forward") == [(2, 3), (4, 5), (6, 7)]
    assert spans(result, 2, "backward") == [(3, 4), (5, 6), (7, 8)]
    assert spans(result, 2, "weight") == [(8, 9), (9, 10), (10, 11)]
    assert spans(result, 1, "backward") == [(4, 5), (6, 7), (8, 9)]
    assert spans(result, 1, "weight") == [(7, 8), (9, 10), (10, 11)]
    assert spans(result, 0, "backward") == [(5, 7), (7, 9), (9, 11)]
    assert result.step_time_s == 11


def test_interleaved_by_hand_with_transfers() -> None:
    """Chunks of 1 + 2; every message takes 0.5; the last stage sends its first chunk's activation back to stage 0."""
    result = run(interleaved(2, 2, 2, 2.0, 4.0), transfer_s=0.5, blocking=True)
    assert spans(result, 0, "forward") == [(0, 1), (1, 2), (3, 4), (4.5, 5.5)]
    assert spans(result, 1, "forward") == [(1.5, 2.5), (3, 4), (4.5, 5.5), (8, 9)]
    assert spans(result, 1, "backward")[0] == (5.5, 7.5)


def test_1f1b_of_three_stages_by_hand() -> None:
    result = run(pipeline("1f1b", 4, [(1.0, 2.0)] * 3))
    assert spans(result, 0, "forward") == [(0, 1), (1, 2), (2, 3), (9, 10)]
    assert spans(result, 0, "backward") == [(7, 9), (10, 12), (13, 15), (16, 18)]
    assert spans(result, 1, "forward") == [(1, 2), (2, 3), (7, 8), (10, 11)]
    assert spans(result, 2, "backward") == [(3, 5), (6, 8), (9, 11), (12, 14)]


def test_gpipe_with_transfers_by_hand() -> None:
    result = run(pipeline("gpipe", 2, [(1.0, 2.0)] * 2), transfer_s=0.5, blocking=True)
    assert spans(result, 1, "receive") == [(0, 1.5), (2.5, 3)]
    assert spans(result, 1, "forward") == [(1.5, 2.5), (3, 4)]
    assert spans(result, 1, "send") == [(6, 6.5), (8.5, 9)]
    assert spans(result, 0, "backward") == [(6.5, 8.5), (9, 11)]
    parts = result.breakdown
    assert (parts.compute_s, parts.communication_s, parts.bubble_s) == (6, 1, 4)
    assert result.step_time_s == 11


def test_1f1b_with_transfers_by_hand() -> None:
    result = run(pipeline("1f1b", 2, [(1.0, 2.0)] * 2), transfer_s=0.5, blocking=True)
    assert spans(result, 1, "backward") == [(2.5, 4.5), (6, 8)]
    assert spans(result, 0, "backward") == [(5, 7), (8.5, 10.5)]
    parts = result.breakdown
    assert (parts.compute_s, parts.communication_s, parts.bubble_s) == (6, 1, 3.5)
    assert result.step_time_s == 10.5


def test_receives_posted_early_by_hand() -> None:
    """Stage 1 posts the receive of 1 before its backward of 0: it travels from 2.5 to 3, where 1f1b above waits."""
    result = run(pipeline("1f1b", 2, [(1.0, 2.0)] * 2), transfer_s=0.5)
    assert spans(result, 0, "send") == [(1, 1.5), (2.5, 3)]
    assert spans(result, 1, "receive") == [(0, 1.5), (2.5, 3)]
    assert spans(result, 1, "backward") == [(2.5, 4.5), (5.5, 7.5)]
    assert spans(result, 0, "receive") == [(1, 5), (5, 8)]
    assert spans(result, 0, "backward") == [(5, 7), (8, 10)]
    parts = result.breakdown
    assert (parts.compute_s, parts.communication_s, parts.bubble_s) == (6, 1, 3)
    assert result.stages[1].op_kinds_s["receive"] == 0.5


def test_streams_move_messages_behind_compute() -> None:
    """The second activation travels from 2 to 2.5 while stage 1 computes; without streams only from 2.5 on."""
    what = pipeline("gpipe", 2, [(1.0, 2.0)] * 2)
    result = simulate(what, Cluster((Device(),) * 2, 0.5), streams=True)
    assert spans(result, 1, "receive") == [(0, 1.5), (1.5, 2.5)]
    assert spans(result, 1, "forward") == [(1.5, 2.5), (2.5, 3.5)]
    assert spans(result, 0, "backward") == [(6, 8), (8, 10)]
    assert (
        result.step_time_s
        == 10
        == step_time_s(what, (price_stages(what, Cluster((Device(),) * 2, 0.5)),), streams=True)
    )


def test_a_delay_keeps_no_stream_busy() -> None:
    """Messages of 2 leave a second apart where one second of each is delay, and two apart where none is."""
    what = pipeline("gpipe", 3, [(1.0, 1.0)] * 2)
    sends = {
        delay: spans(simulate(what, Cluster((Device(),) * 2, 2.0, delay), streams=True), 0, "send") for delay in (0, 1)
    }
    assert sends == {0: [(1, 3), (3, 5), (5, 7)], 1: [(1, 3), (2, 4), (3, 5)]}


def test_a_window_hides_what_a_message_takes() -> None:
    """Four seconds each way and two of work: a round trip of ten takes a window of five."""
    what = pipeline("1f1b", 40, [(1.0, 1.0)] * 2)
    cluster = Cluster((Device(),) * 2, 4.0, 4.0)
    times = [simulate(dataclasses.replace(what, window=window), cluster).step_time_s for window in (1, 2, 4, 5, 6)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == times[-2] == 1 + 4 + 40 * 2 + 4 + 1 and times[0] > 40 * 5


def test_messages_under_way_leave_one_after_the_other() -> None:
    """Of three seconds each, one of them delay: two are under way at once, and leave two seconds apart."""
    what = dataclasses.replace(pipeline("1f1b", 4, [(0.5, 0.5)] * 2), window=4)
    result = simulate(what, Cluster((Device(),) * 2, 3.0, 1.0))
    assert spans(result, 0, "send") == [(0.5, 3.5), (2.5, 5.5), (4.5, 7.5), (6.5, 9.5)]


def test_a_sender_waits_for_its_send_before() -> None:
    """Stage 1 has microbatch 1 only at 8, so stage 0 cannot post microbatch 2 at 3 and begin the next forward."""
    result = run(pipeline("gpipe", 4, [(1.0, 0.0), (5.0, 0.0)]), transfer_s=1.0, blocking=True)
    assert spans(result, 0, "send") == [(1, 2), (7, 8), (13, 14), (19, 20)]
    assert spans(result, 0, "forward") == [(0, 1), (1, 2), (2, 3), (8, 9)]
    assert result.step_time_s == 20 + 5 + 4


def test_the_slowest_pair_of_ranks_sets_a_transfer() -> None:
    stages = [stage_program(i, 2, [op(1.0)], [op(1.0)]) for i in range(2)]
    what = program(stages, 1, "1f1b", dp=2)
    cluster = Cluster((Device(),) * 4, transfers_s={(0, 2): 1.0, (1, 3): 3.0, (2, 0): 0.5, (3, 1): 0.25})
    assert simulate(what, cluster).step_time_s == 4 + 3.0 + 0.5


def two_replicas(schedule: str = "gpipe", microbatches: int = 1, pp: int = 2, reduced: int = 0) -> Program:
    step = [collective("dp", reduced)] if reduced else []
    return program([stage_program(i, pp, [op(1.0)], [op(1.0)], step) for i in range(pp)], microbatches, schedule, dp=2)


def test_uneven_replicas_run_on_their_own_links() -> None:
    """One waits 3 + 0.5 for its transfers, the other 1 + 2: the slowest of each direction belongs to neither."""
    links = {(0, 2): 3.0, (2, 0): 0.5, (1, 3): 1.0, (3, 1): 2.0}
    uneven = Cluster((Device(),) * 4, transfers_s=links, uneven=True)
    assert simulate(two_replicas(), uneven).step_time_s == 4 + 3.5
    assert simulate(two_replicas(), dataclasses.replace(uneven, uneven=False)).step_time_s == 4 + 5.0


def test_uneven_replicas_meet_where_gradients_are_reduced() -> None:
    """Stage 0 ends at 4 in the one and at 7 in the other, stage 1 at 3 and at 6, when its gradient has arrived."""
    links = {(0, 2): 0.0, (2, 0): 0.0, (1, 3): 1.5, (3, 1): 1.5}
    result = simulate(two_replicas(reduced=1), Cluster((Device(),) * 4, transfers_s=links, uneven=True))
    assert [(e.start_s, e.end_s) for e in result.timeline if e.name == "all_reduce dp"] == [(7.0, 8.0), (6.0, 11.0)]
    assert result.step_time_s == 11.0


@pytest.mark.parametrize(("schedule", "window"), [("gpipe", 1), ("1f1b", 1), ("1f1b", 3)])
def test_seconds_alone_are_those_of_a_simulation(schedule: str, window: int) -> None:
    """In any order of replicas, and infinite once one of them is over a limit."""
    links = {(0, 2): 0.75, (2, 0): 0.5, (1, 3): 1.0, (3, 1): 2.0}
    what = dataclasses.replace(two_replicas(schedule, 6, reduced=1), window=window)
    cluster = Cluster((Device(),) * 4, transfers_s=links, uneven=True)
    step_s, replicas = simulate(what, cluster).step_time_s, price_replicas(what, cluster)
    assert len(replicas) == 2 and step_time_s(what, replicas) == step_s
    ordered = slowest_first(tuple(reversed(replicas)), what.microbatches)
    assert step_time_s(what, ordered, limit_s=step_s) == step_s
    assert step_time_s(what, ordered[:1]) <= step_s
    assert step_time_s(what, ordered, limit_s=0.5 * step_s) == float("inf")


def test_replicas_that_meet_in_every_microbatch_count_as_one() -> None:
    slow = [stage_program(i, 2, [op(1.0), issue(collective("dp", 0))], [op(1.0)]) for i in range(2)]
    links = {(0, 2): 3.0, (2, 0): 0.5, (1, 3): 1.0, (3, 1): 2.0}
    cluster = Cluster((Device(),) * 4, transfers_s=links, uneven=True)
    assert simulate(program(slow, 1, "gpipe", dp=2), cluster).step_time_s == 4 + 5.0


def test_uneven_devices_slow_down_their_own_replica() -> None:
    devices = (Device(), Device(slowness=3.0), Device(slowness=2.0), Device())
    assert simulate(two_replicas(), Cluster(devices, uneven=True)).step_time_s == 8.0
    assert simulate(two_replicas(), Cluster(devices)).step_time_s == 10.0


def test_equal_replicas_are_simulated_once() -> None:
    cluster = Cluster((Device(),) * 4, transfer_s=0.5, uneven=True)
    assert len(price_replicas(two_replicas(), cluster)) == 1
    other = dataclasses.replace(cluster, transfers_s={(1, 3): 0.25})
    assert len(price_replicas(two_replicas(), other)) == 2


def test_a_rendezvous_takes_a_notice_before_the_message() -> None:
    """The receiver waits from 0 and the sender has its message at 1, so only a notice of more than that is felt."""
    what = pipeline("gpipe", 1, [(1.0, 1.0)] * 2)
    for delay_s, notice in ((0.5, 0.0), (1.5, 0.5)):
        cluster = Cluster((Device(),) * 2, transfer_s=2.0, delay_s=delay_s, rendezvous=True)
        first = spans(simulate(what, cluster), 1, "receive")[0]
        assert first == (0.0, 1.0 + notice + 2.0)


@pytest.mark.parametrize(("there_s", "back_s"), [(2.0, 0.0), (0.0, 2.0), (2.0, 3.0)])
def test_each_way_has_a_delay_of_its_own(there_s: float, back_s: float) -> None:
    """Messages that are all delay leave as soon as they are ready, whatever the delay the other way."""
    delays_s = {(0, 1): there_s, (1, 0): back_s}
    cluster = Cluster((Device(),) * 2, transfers_s=delays_s, delays_s=delays_s)
    what = dataclasses.replace(pipeline("1f1b", 3, [(0.5, 0.5)] * 2), window=3)
    found = simulate(what, cluster)
    assert [start for start, _ in spans(found, 1, "forward")] == [0.5 + there_s + i for i in range(3)]
    assert [start for start, _ in spans(found, 0, "backward")] == [1.5 + there_s + back_s + i for i in range(3)]


def test_a_sender_hears_of_a_receiver_over_the_way_back() -> None:
    """The receiver calls at 0, the sender has its message at 1 and knows at the delay of the way back."""
    cluster = Cluster(
        (Device(),) * 2, transfer_s=2.0, delays_s={(0, 1): 0.5, (1, 0): 1.75}, delay_s=0.0, rendezvous=True
    )
    assert spans(simulate(pipeline("gpipe", 1, [(1.0, 1.0)] * 2), cluster), 1, "receive")[0] == (0.0, 1.75 + 2.0)


def test_messages_that_have_arrived_still_take_a_rank_to_handle() -> None:
    """Stage 1 computes for 5 a microbatch: all but its first activation are there before it asks for them, and each
    keeps it for 0.25; while it waits for the first, a part of the transfer, nothing is added."""
    what = pipeline("gpipe", 4, [(1.0, 1.0), (5.0, 1.0)])
    free = Cluster((Device(),) * 2, transfer_s=0.5)

    def forwards(cluster: Cluster) -> list[float]:
        return [start for start, _ in spans(simulate(what, cluster), 1, "forward")]

    assert forwards(free) == [1.5, 6.5, 11.5, 16.5]
    assert forwards(dataclasses.replace(free, handled_s=0.25)) == [1.5, 6.75, 12.0, 17.25]


def test_messages_both_ways_share_a_senders_rate() -> None:
    """Stage 1 sends an activation for 4 and, 1.5 after it began, a gradient, which waits for it on a shared rate."""
    times = [(1.0, 1.0), (5.0, 1.0), (1.0, 1.0)]
    links = {(0, 1): 0.5, (1, 0): 0.5, (1, 2): 4.0, (2, 1): 0.5}
    free = Cluster((Device(),) * 3, transfers_s=links, uneven=True)

    def gradients(shared: frozenset[int]) -> list[float]:
        result = simulate(pipeline("1f1b", 4, times), dataclasses.replace(free, shared=shared), blocking=True)
        return [end for _, end in spans(result, 0, "receive")]

    assert gradients(frozenset({0, 2})) == gradients(frozenset())  # these send one way only
    late = [b - a for a, b in zip(gradients(frozenset()), gradients(frozenset({1})), strict=True)]
    assert late[0] == 2.5


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=12))
def test_what_shares_a_rate_leaves_one_at_a_time(messages: list[tuple[int, int]]) -> None:
    """Second by second: each message in turn takes the first ones that are left from when it is ready."""
    egress, taken = Egress(True), set[int]()
    for ready, busy in messages:
        own = list(itertools.islice((s for s in itertools.count(ready) if s not in taken), busy))
        taken.update(own)
        assert egress.send(float(ready), float(busy)) == (own[0], own[-1] + 1)
    assert all(a < b for a, b in zip(egress.begins, egress.ends, strict=True))
    assert Egress(False).send(1.0, 2.0) == (1.0, 3.0)


def test_the_slowest_device_of_a_stage_sets_its_ops() -> None:
    what = program([stage_program(0, 1, [op(1.0)], [op(2.0)])], 1, "gpipe", dp=2)
    assert simulate(what, Cluster((Device(), Device(slowness=3.0)))).step_time_s == 9.0


@pytest.mark.parametrize(("kind", "seconds"), [("cpu", 1.25), ("cuda", 1.0)])
def test_views_cost_host_time_only_where_the_host_computes(kind: str, seconds: float) -> None:
    what = program([stage_program(0, 1, [op(1.0), issue(None)], [])], 1, "gpipe")
    result = run(what, device=Device(kind=kind))
    assert result.stages[0].forward_s == seconds
    assert result.stages[0].op_kinds_s["view"] == seconds - 1.0


def test_axis_groups() -> None:
    stages = [stage_program(i, 2, [], [], tied="wte") for i in range(2)]
    what = program(stages, 1, "gpipe", dp=2, tp=2)
    assert axis_groups(what, "tp", 1) == ((4, 5), (6, 7))
    assert axis_groups(what, "dp", 1) == ((4, 6), (5, 7))
    assert axis_groups(what, "dp_tp", 1) == ((4, 5, 6, 7),)
    assert axis_groups(what, "tied:wte", 1) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert axis_groups(what, "world", 0) == (tuple(range(8)),)
    with pytest.raises(UnknownNameError, match="did you mean 'dp_tp'"):
        axis_groups(what, "dptp", 0)


def test_groups_of_several_axes() -> None:
    what = replace(program([stage_program(0, 1, [], [])], 1, "gpipe", dp=2, tp=4), tp_sizes=(2, 2))
    assert axis_groups(what, "tp", 0) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert axis_groups(what, "tp0", 0) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert axis_groups(what, "tp1", 0) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert axis_groups(what, "tp1_tp0", 0) == ((0, 2, 1, 3), (4, 6, 5, 7))
    assert axis_groups(what, "dp_tp1", 0) == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert axis_groups(what, "dp", 0) == ((0, 4), (1, 5), (2, 6), (3, 7))
    with pytest.raises(UnknownNameError):
        axis_groups(what, "tp2", 0)


def test_collectives_in_blocks_are_exposed_and_take_the_slowest_group() -> None:
    """Groups (0, 1) and (2, 3) run at once: 5 seconds. A group of one costs nothing."""
    what = program([stage_program(0, 1, [op(1.0), issue(collective("tp"))], [])], 2, "gpipe", dp=2, tp=2)
    result = run(what)
    assert result.stages[0].forward_s == 6.0
    assert (result.breakdown.compute_s, result.breakdown.communication_s) == (2.0, 10.0)
    assert result.stages[0].op_kinds_s["all_reduce"] == 10.0
    alone = program(what.stages, 2, "gpipe", dp=2, tp=1)
    assert run(alone).breakdown.communication_s == 0.0


def test_step_work_comes_after_the_last_backward() -> None:
    stage = stage_program(0, 1, [op(1.0)], [op(2.0)], [collective("dp", 4), collective("dp", 2)], optimizer_s=0.5)
    result = run(program([stage], 2, "1f1b", dp=2))
    assert result.stages[0].reduce_s == 6.0
    assert (result.breakdown.reduction_s, result.breakdown.optimizer_s) == (6.0, 0.5)
    assert result.step_time_s == 6.0 + 6.0 + 0.5
    assert result.timeline[-2:] == (
        Event(0, "compute", "all_reduce dp", -1, 10.0, 12.0),
        Event(0, "compute", "optimizer", -1, 12.0, 12.5),
    )


def test_the_last_sends_are_waited_for_before_the_step_work() -> None:
    """Stage 1 ends its backward at 4.5 and its gradient is on the way until 5."""
    stages = [stage_program(i, 2, [op(1.0)], [op(2.0)], [collective("dp")]) for i in range(2)]
    result = run(program(stages, 1, "gpipe", dp=2), transfer_s=0.5)
    assert spans(result, 1, "all_reduce dp") == [(5, 10)]


def test_a_tied_reduction_waits_for_both_stages() -> None:
    """Stage 1 ends at 6 and reduces alone until 9; stage 0 ends at 9, so both meet at 9 and take 1."""
    first = stage_program(0, 2, [op(1.0)], [op(2.0)], [collective("tied:wte")], tied="wte")
    last = stage_program(1, 2, [op(1.0)], [op(2.0)], [collective("tied:wte")], tied="wte")
    result = run(program([first, last], 2, "1f1b"))
    assert spans(result, 0, "all_reduce tied:wte") == spans(result, 1, "all_reduce tied:wte") == [(9, 10)]
    assert result.step_time_s == 10


def test_collectives_between_stages_in_different_orders() -> None:
    pair = [collective("tied:a"), collective("world")]
    stages = [stage_program(i, 2, [], [], order, tied="a") for i, order in enumerate((pair, pair[::-1]))]
    with pytest.raises(VerificationError) as caught:
        run(program(stages, 1, "gpipe"))
    assert caught.value.check == "step_collectives"


def test_a_tied_reduction_without_the_parameter() -> None:
    stages = [stage_program(0, 2, [], [], tied="a"), stage_program(1, 2, [], [], [collective("tied:a")])]
    with pytest.raises(VerificationError) as caught:
        run(program(stages, 1, "gpipe"))
    assert caught.value.check == "tied"


def test_a_collective_between_stages_inside_a_block() -> None:
    stages = [stage_program(i, 2, [issue(collective("world"))], []) for i in range(2)]
    with pytest.raises(VerificationError) as caught:
        run(program(stages, 1, "gpipe"))
    assert caught.value.check == "block_collectives"


def test_driving_overhead_is_counted_as_other() -> None:
    what = pipeline("1f1b", 2, [(1.0, 2.0)])
    result = simulate(what, Cluster((Device(),)), driving_s=0.125)
    assert (result.step_time_s, result.breakdown.other_s, result.breakdown.total_s) == (6.125, 0.125, 6.125)


def test_a_step_takes_its_time_for_every_tensor_that_it_updates() -> None:
    def step_s(optimizer_s: float, device: Device) -> float:
        own = stage_program(0, 1, [op(1.0)], [op(2.0)], optimizer_s=optimizer_s)
        return simulate(program([own], 1, "1f1b"), Cluster((device,))).step_time_s

    assert step_s(0.5, Device(update_s=0.25)) == step_s(0.5, Device()) + 0.25


def test_chrome_trace_has_every_event_in_microseconds() -> None:
    result = run(pipeline("1f1b", 2, [(1.0, 2.0)] * 2), transfer_s=0.5)
    trace = chrome_trace(result)["traceEvents"]
    assert isinstance(trace, list)
    assert sum(event["ph"] == "X" for event in trace) == len(result.timeline)
    last = next(event for event in trace if event["name"] == "backward 1" and event["pid"] == 0)
    assert (last["ts"], last["dur"]) == (8e6, 2e6)
    names = {event["args"]["name"] for event in trace if event["ph"] == "M" and event["pid"] == 1}
    assert names == {"stage 1", "compute", "receive", "send_forward", "send_backward"}


def test_an_estimate_carries_plan_and_figures() -> None:
    what = pipeline("1f1b", 2, [(1.0, 2.0)] * 2)
    stages = tuple(StagePlan(i, i + 1, {}) for i in range(2))
    plan = Plan("m", "c", 2, 1, 1, 2, "1f1b", 1, 2, 100, (0, 1), stages, ("a", "b"))
    estimate = estimate_of(simulate(what, Cluster((Device(),) * 2)), plan, ["said"], 0.5, 0.01)
    assert (estimate.step_time_s, estimate.notes, estimate.search_s, estimate.gap) == (9.0, ("said",), 0.5, 0.01)
    assert estimate.plan is plan and len(estimate.stages) == 2
    assert estimate.peak_bytes == max(stage.peak_bytes for stage in estimate.stages) > 0


@pytest.mark.parametrize("schedule", [pytest.param("gpipe", marks=pytest.mark.slow), "1f1b"])
def test_64_stages_of_512_microbatches_take_about_a_second(schedule: str) -> None:
    block = [op(1e-4 * (i % 7), f"kind{i % 5}") for i in range(300)]
    stages = [stage_program(i, 64, block, block * 2) for i in range(64)]
    what = program(stages, 512, schedule)
    assert min(paced_s(lambda: _afresh(what)) for _ in range(3)) < 2.0


def _afresh(what: Program) -> None:
    stage_schedule.cache_clear()
    run(what, 1e-4)
