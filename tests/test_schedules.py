"""Schedules that are chosen after the search: where they hold too much for a plan, another is searched for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from models import example_gpt
from parity import ADAMW, cpu_cluster

from autopar import rescheduled
from autopar.options import Options
from autopar.planner.search import Solution, is_interrupted
from autopar.planning import Job, Planned
from autopar.schedules import faster_schedules, may_fit, may_hold
from autopar.timing import waited_s
from cost_model.cluster import Cluster
from cost_model.parallelism import Parallelism
from cost_model.sketch import most_kept_bytes, with_weight_blocks


def test_a_faster_schedule_that_holds_too_much_gets_a_plan_of_its_own() -> None:
    """Over slow links windows of 1f1b hide messages but hold more; under a cap that plain 1f1b fills they recompute."""
    model, batch = example_gpt(n_layer=4)
    pins = Parallelism(dp=1, tp=1, pp=2, microbatch_size=1, schedule="1f1b")
    job = Job.of(model, cpu_cluster(2, 3e6), batch, Options.of(None, ADAMW, pins, None, None, None))
    plain = job.under(replace(pins, window=1, recompute="none"), None)
    found = plain.plan(plain.solve())
    cap = max(plain.peaks(found))
    wider = replace(found, window=2)
    assert max(job.peaks(wider)) > cap and job.step_s(wider) < job.step_s(found)
    under = job.under(pins, cap)
    chosen = under.planned(under.decide(0.0))
    assert chosen.plan.window > 1 and chosen.plan.recompute != "none"
    assert chosen.estimate.peak_bytes <= cap and chosen.estimate.step_time_s < job.step_s(found)
    assert chosen.estimate.gap == under.solve().gap
    assert any("was chosen after the search" in note for note in chosen.estimate.notes)


def test_a_schedule_that_waits_less_is_searched_for_with_any_number_of_stages() -> None:
    """Plain 1f1b on few stages is best of 1f1b where many stages wait long; where they wait less they may be better."""
    model, batch = example_gpt(n_layer=4)
    free = Parallelism(microbatch_size=1)
    job = Job.of(model, cpu_cluster(4, 1e9), batch, Options.of(None, ADAMW, free, None, None, None))
    cap = round(0.6 * max(job.peaks(job.plan(job.solve()))))
    under = job.under(free, cap)
    chosen, found = under.attempt(), under.solve().configuration
    pins = replace(free, tp=found.tp, schedule="zero_bubble", recompute="none")
    other = job.under(pins, cap).attempt()
    assert isinstance(chosen, Planned) and isinstance(other, Planned)
    assert chosen.plan.pp > found.pp and chosen.plan.schedule == "zero_bubble"
    assert chosen.estimate.step_time_s <= other.estimate.step_time_s


def test_other_schedules_of_a_plan_with_a_window_have_none() -> None:
    model, batch = example_gpt(n_layer=4)
    job = Job.of(model, cpu_cluster(2), batch, Options.of(None, ADAMW, Parallelism(pp=2, window=2), None, None, None))
    found = job._searched()
    assert isinstance(found, Solution) and found.configuration.window == 2
    program, free = job.program(job.plan(found)), Parallelism(pp=2)
    base = replace(job.simulated(job.plan(found)), step_time_s=1e9)  # whatever is slower
    base = replace(base, breakdown=replace(base.breakdown, bubble_s=1e9))
    schedules = [c for _, c in faster_schedules(found, program, base, job.cluster, free)]
    assert "zero_bubble" in {c.schedule for c in schedules}
    for c in schedules:
        assert job.plan(replace(found, configuration=c)).schedule == c.schedule


def test_virtual_stages_hold_no_less_than_is_known_before_they_are_made() -> None:
    """Together: the schedule is not looked at further where that is more than there is."""
    model, batch = example_gpt(n_layer=4)
    pins = Parallelism(dp=1, tp=1, pp=2, microbatch_size=1, schedule="1f1b", window=1)
    job = Job.of(model, cpu_cluster(2), batch, Options.of(None, ADAMW, pins, None, None, None))
    solution = job.solve()
    plain = job.plan(solution)
    program, static = job.program(plain), job.static_bytes(plain)
    c = replace(solution.configuration, schedule="interleaved", virtual_stages=2)
    peaks = job.peaks(job.plan(replace(solution, configuration=c)))
    assert may_fit(solution, c, program, static, peaks)
    saved = sum(peaks) - sum(static)
    assert not may_fit(solution, c, program, static, [sum(static) + saved // 2, 0])


@pytest.mark.parametrize(
    ("pins", "nearly"), [({"recompute": "none"}, 0.5), ({"recompute": "selective"}, 0.5), ({"zero": 3}, 0.3)]
)
def test_what_a_schedule_is_known_to_hold_is_near_what_it_holds(pins: dict[str, Any], nearly: float) -> None:
    """nearly: of what a stage holds beside what it always does; the rest are moments."""
    model, batch = example_gpt(n_layer=4)
    fixed = Parallelism(**{"dp": 2, "tp": 1, "pp": 2, "microbatch_size": 1, "schedule": "1f1b", **pins})
    job = Job.of(model, cpu_cluster(4, 1e9), batch, Options.of(None, ADAMW, fixed, None, None, None))
    solution = job.solve()
    plan = job.plan(solution)
    program, static = job.program(plan), job.static_bytes(plan)
    for changes in ({"window": 2}, {"schedule": "zero_bubble"}):
        c = replace(solution.configuration, **changes)
        peaks = job.peaks(job.plan(replace(solution, configuration=c)))
        assert may_fit(solution, c, program, static, peaks)
        for stage, (always, most) in enumerate(zip(static, peaks, strict=True)):
            caps = [*peaks[:stage], always + round(nearly * (most - always)), *peaks[stage + 1 :]]
            assert not may_fit(solution, c, program, static, caps)


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_zero_bubble_keeps_what_gradients_wait_for_whatever_is_made_again(recompute: str) -> None:
    model, batch = example_gpt(n_layer=4)
    pins = Parallelism(dp=1, tp=1, pp=4, microbatch_size=1, schedule="1f1b", window=1, recompute=recompute)
    job = Job.of(model, cpu_cluster(4), batch, Options.of(None, ADAMW, pins, None, None, None))
    solution = job.solve()
    plan, c = job.plan(solution), replace(solution.configuration, schedule="zero_bubble")
    program, static = job.program(plan), job.static_bytes(plan)
    kept = most_kept_bytes(with_weight_blocks(program))
    assert kept[0] == 0 and 2.5 * kept[1] < kept[3], "the first stage keeps nothing, the others one more each"
    peaks = job.peaks(replace(plan, schedule="zero_bubble"))
    for own, always, most in zip(kept[1:], static[1:], peaks[1:], strict=True):
        assert own < most - always < (2.0 if recompute == "full" else 3.0) * own
    needed = [own + always for own, always in zip(kept, static, strict=True)]
    ends = [(first, first + 10) for first in (0, 10, 20, 30)]
    stages = (replace(s, first=a, last=b, time_s=1.0) for s, (a, b) in zip(solution.stages, ends, strict=True))
    alike = replace(solution, stages=tuple(stages))

    def fits(caps: list[int], slower: float, samples: int = 1, found: Solution = alike) -> bool:
        return may_hold(found, c, program, static, caps, samples, slower)

    assert fits(needed, 1.0) and not fits([*needed[:3], needed[3] - 1], 1.0)
    uneven = [*needed[:2], 2 * needed[2], round(0.85 * needed[3])]
    assert fits(uneven, 1.2) and not fits(uneven, 1.1), "one gives others two, which have time for them"
    light = replace(alike, stages=(*alike.stages[:2], replace(alike.stages[2], time_s=0.8), alike.stages[3]))
    assert fits(uneven, 1.0, found=light), "and takes what the slowest has already"
    idle = replace(alike, stages=tuple(replace(stage, time_s=0.0) for stage in alike.stages))
    assert fits(needed, 1.0, found=idle), "what takes no time is not too slow for any stage"
    assert not fits(needed, 1.0, samples=2), "larger microbatches keep more, and wait longer"
    assert may_hold(solution, solution.configuration, program, static, [0] * 4, 1, 1.0), "others hold what prices know"


@pytest.mark.parametrize("meshes", [[(4, 1)], pytest.param([(4, 2), (1, 4)], marks=pytest.mark.slow)], ids=str)
def test_messages_between_nodes_are_waited_for_in_every_plan_that_is_compared(meshes: list[tuple[int, int]]) -> None:
    """Stages of half a node send over fast and slow links in turn: no pipeline is faster than the plan chosen."""
    model, batch = example_gpt(n_layer=4, n_embd=128)
    batch = {name: value.repeat(8, 1) for name, value in batch.items()}
    cluster = Cluster.load("p3.8xlarge", num_devices=8)
    job = Job.of(model, cluster, batch, Options.of(None, ADAMW, Parallelism(), None, None, None))
    chosen = job.decide(0.0).plan
    for pp, tp in meshes:
        pins = Parallelism(dp=8 // pp // tp, tp=tp, pp=pp)
        assert job.step_s(chosen) <= job.step_s(job.under(pins, None).decide(0.0).plan), pins


def test_sums_behind_backward_are_looked_at_on_other_meshes_too() -> None:
    """Eight replicas take least while nothing moves; four hide sums of whole gradients, and are faster."""
    model, batch = example_gpt(n_layer=2, n_embd=1024)
    batch = {name: value.repeat(16, 1) for name, value in batch.items()}
    cluster = Cluster.load("dgx-a100-80gb", num_devices=16)
    job = Job.of(model, cluster, batch, Options.of(None, ADAMW, Parallelism(pp=1), None, None, None))
    four = job.under(Parallelism(dp=4, pp=1), None)
    assert job.step_s(job.decide(0.0).plan) <= four.step_s(four.decide(0.0).plan)


def test_ctrl_c_while_another_schedule_is_searched_for_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plan that was found, not with a search that goes on."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model, batch = example_gpt(n_layer=4)
    job = Job.of(model, cpu_cluster(4, 1e9), batch, Options.of(None, ADAMW, Parallelism(), None, None, None))
    monkeypatch.setattr(rescheduled, "search", interrupted)
    found = job.solve()
    assert is_interrupted(found.notes) and job.decide(0.0).plan.pp == found.configuration.pp


def test_a_plan_that_cannot_move_its_collectives_as_pinned_is_slower_than_any() -> None:
    model, batch = example_gpt()
    pins = Parallelism(dp=2, tp=1, pp=1, zero=3, overlap=True)
    job = Job.of(model, cpu_cluster(2), batch, Options.of(None, ADAMW, pins, None, None, None))
    found = job._searched()
    assert isinstance(found, Solution)
    plan = job.plan(found)
    peaks = [max(job.peaks(each)) for each in (plan, replace(plan, overlap=True))]
    assert peaks[0] < peaks[1]
    assert waited_s(job.under(pins, peaks[0]), found) == math.inf > waited_s(job.under(pins, peaks[1]), found)
