"""Collectives behind compute: where they begin and end, what that costs, and that they train as one device does."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import example_gpt
from parity import ADAMW, check_parity, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import autopar
from autopar.options import Options
from autopar.planning import Job, Planned, plan_model
from cost_model.background import Streams, check_waited
from cost_model.cluster import Cluster
from cost_model.errors import InfeasiblePlanError, VerificationError
from cost_model.parallelism import Parallelism
from cost_model.plan import Plan
from cost_model.prices import hidable_s
from cost_model.program import Block, Collective, Instruction, StageProgram, Value
from cost_model.tensor import TensorMeta
from passes import vocabulary
from passes.overlap import overlap
from passes.split import SplitGraphs
from passes.verify import verify_emitted, verify_step

aten = torch.ops.aten
MEMORY_LOW, MEMORY_HIGH = 0.0, 0.03


@functools.cache
def planned(overlap: bool = True, **pins: Any) -> Planned:
    model, batch = example_gpt()
    devices = math.prod(pins.get(name, 1) for name in ("dp", "tp", "pp"))
    parallelism = Parallelism(**{"dp": 1, "tp": 1, "pp": 1, **pins}, overlap=overlap)
    found = plan_model(model, cpu_cluster(devices), batch, Options.of(None, ADAMW, parallelism, None, None, None))
    found.linked.verify()
    return found


def stage_of(overlap: bool = True, **pins: Any) -> StageProgram:
    return planned(overlap, **pins).linked.program.stages[0]


# --- What they gain


@pytest.mark.parametrize(
    "pins", [{"dp": 4, "zero": 2}, {"dp": 4, "zero": 3}, {"dp": 2, "tp": 2, "zero": 3}, {"dp": 1, "tp": 4}]
)
def test_no_more_is_gained_than_can_be_hidden(pins: dict[str, int]) -> None:
    """On GPUs, whose links move bytes while they compute; nor is it more than all collectives take."""
    model, batch = example_gpt()
    parallelism = Parallelism(**{"tp": 1, "pp": 1, **pins}, overlap=False)
    options, cluster = (
        Options.of(None, ADAMW, parallelism, None, None, None),
        Cluster.load("dgx2-v100-32gb", num_devices=4),
    )
    job = Job.of(model, cluster, batch, options)
    plain = job.plan(job.solve())
    most_s, step = hidable_s(job.program(plain), cluster), job.simulated(plain)
    gained_s = step.step_time_s - job.step_s(replace(plain, overlap=True))
    assert -1e-12 <= gained_s <= most_s and (gained_s > 0 or "zero" not in pins)
    assert most_s <= (step.breakdown.communication_s + step.breakdown.reduction_s) * (1 + 1e-9)


# --- Where collectives begin and end


def test_parameters_are_gathered_a_segment_ahead_both_ways() -> None:
    for block in stage_of(dp=2, zero=3).chunks[0].blocks:
        begun = {i.outputs[0].name: at for at, i in enumerate(block.instructions) if i.begins and "gather" in i.op}
        waits = {i.awaits: at for at, i in enumerate(block.instructions) if i.awaits in begun}
        segments = [block.instructions[waits[name]].segment for name in begun]
        assert len(set(segments)) >= 4 and len(waits) == len(begun)
        first_wait = {
            segment: min(waits[n] for n in begun if _segment(block, waits[n]) == segment) for segment in segments
        }
        order = list(dict.fromkeys(segments))
        for name, segment in zip(begun, segments, strict=True):
            place = order.index(segment)
            if place:  # where those of the segment before are there, with all its work before the wait
                work = block.instructions[begun[name] : waits[name]]
                assert first_wait[order[place - 1]] < begun[name] < waits[name]
                assert sum(i.cost is not None for i in work) >= 1


def _segment(block: Block, at: int) -> int:
    return block.instructions[at].segment


def test_sums_of_gradients_are_awaited_a_segment_later() -> None:
    (chunk,) = stage_of(dp=2, zero=2).chunks
    lines = chunk.backward.instructions
    begun = {i.outputs[0].name: at for at, i in enumerate(lines) if i.begins}
    ended = {i.awaits: at for at, i in enumerate(lines) if i.awaits}
    assert begun.keys() == ended.keys() and len(begun) >= 5
    assert any(ended[name] - at > 20 for name, at in begun.items())
    plain = list(stage_of(False, dp=2, zero=2).chunks[0].backward.collectives())
    assert sorted(map(str, chunk.backward.collectives())) == sorted(map(str, plain))


SUMMED_BEFORE = """
passed = aten.mm.default(grad, weight)
product = autopar.accumulate_product.default(saved, grad, 'w')
bias = aten.sum.dim_IntList(grad, [0])
accumulate = autopar.accumulate.default(bias, 'b')
all_reduce = autopar.all_reduce.default(passed, 'tp', 'sum')
relu = aten.relu.default(grad)
add = aten.add.Tensor(all_reduce, relu)
"""
SUMMED_AFTER = """
passed = aten.mm.default(grad, weight)
begin_all_reduce_default = autopar.begin_all_reduce.default(passed, 'tp', 'sum')
product = autopar.accumulate_product.default(saved, grad, 'w')
bias = aten.sum.dim_IntList(grad, [0])
accumulate = autopar.accumulate.default(bias, 'b')
relu = aten.relu.default(grad)
wait_default = autopar.wait.default(begin_all_reduce_default)
add = aten.add.Tensor(wait_default, relu)
"""


def test_gradients_of_parameters_are_made_behind_sums_of_tensor_parallelism() -> None:
    graph = fx.Graph()
    grad, weight, saved = (graph.placeholder(name) for name in ("grad", "weight", "saved"))

    def call(target: Any, *args: Any, name: str) -> fx.Node:
        return graph.create_node("call_function", target, args, name=name)

    made = call(aten.mm.default, grad, weight, name="passed")
    call(vocabulary.accumulate_product, saved, grad, "w", name="product")
    call(vocabulary.accumulate, call(aten.sum.dim_IntList, grad, [0], name="bias"), "b", name="accumulate")
    summed = call(vocabulary.all_reduce, made, "tp", "sum", name="all_reduce")
    graph.output((call(aten.add.Tensor, summed, call(aten.relu.default, grad, name="relu"), name="add"),))
    with FakeTensorMode():
        for node in graph.nodes:
            node.meta = {"val": torch.empty(4, 4), "segment": 0, "storage": ("own", node.name)}
    forward = fx.Graph()
    forward.output(())
    assert _text(graph) == SUMMED_BEFORE
    overlap(SplitGraphs(forward, forward, graph, (), None, "", (), ()), "dp")
    assert _text(graph) == SUMMED_AFTER


SUM_OF_A_GRADIENT = """
passed = aten.mm.default(grad, weight)
begin_all_reduce_default = autopar.begin_all_reduce.default(passed, 'tp', 'sum')
bias = aten.sum.dim_IntList(grad, [0])
wait_default = autopar.wait.default(begin_all_reduce_default)
accumulate_default = autopar.accumulate.default(wait_default, 'w')
accumulate_default_1 = autopar.accumulate.default(bias, 'b')
"""


def test_a_sum_that_leads_to_gradients_alone_begins_after_what_it_sums() -> None:
    graph = fx.Graph()
    grad, weight = (graph.placeholder(name) for name in ("grad", "weight"))
    made = graph.create_node("call_function", aten.mm.default, (grad, weight), name="passed")
    bias = graph.create_node("call_function", aten.sum.dim_IntList, (grad, [0]), name="bias")
    summed = graph.call_function(vocabulary.all_reduce, (made, "tp", "sum"))
    graph.call_function(vocabulary.accumulate, (summed, "w"))
    graph.call_function(vocabulary.accumulate, (bias, "b"))
    graph.output(())
    with FakeTensorMode():
        for node in graph.nodes:
            node.meta = {"val": torch.empty(4, 4), "segment": 0, "storage": ("own", node.name)}
    forward = fx.Graph()
    forward.output(())
    overlap(SplitGraphs(forward, forward, graph, (), None, "", (), ()), "dp")
    assert _text(graph) == SUM_OF_A_GRADIENT


def _text(graph: fx.Graph) -> str:
    calls = (n for n in graph.nodes if n.op == "call_function")
    return "\n" + "".join(f"{n.name} = {n.target}({', '.join(map(repr, n.args))})\n" for n in calls)


def test_gradients_of_replicas_are_reduced_in_groups_as_they_are_complete() -> None:
    whole, stage = stage_of(False, dp=2, zero=0), stage_of(dp=2, zero=0)
    groups = [group for collective, group in stage.step.reductions if collective.axis == "dp"]
    marks = [i.completes for i in stage.chunks[0].backward.instructions if i.completes is not None]
    assert groups == marks == ["0", "1", "2", "3"] + ["4"] * (len(groups) > 4)
    assert sum(c.nbytes for c in stage.step.collectives) == sum(c.nbytes for c in whole.step.collectives)
    assert all(group is None for _, group in whole.step.reductions)


@pytest.mark.slow
def test_groups_over_several_microbatches_and_stages() -> None:
    for stage in planned(dp=2, pp=2, zero=0, schedule="zero_bubble", microbatch_size=1).linked.program.stages:
        (chunk,) = stage.chunks
        marks = [i.completes for i in chunk.backwards[-1].instructions if i.completes is not None]
        assert marks and set(marks) == {group for _, group in stage.step.reductions if group is not None}


def test_plans_say_it() -> None:
    plan = planned(dp=2, zero=3).plan
    assert plan.overlap and "overlap" in str(plan) and Plan.from_json(plan.to_json()) == plan


# --- What is refused


def test_what_begins_must_be_awaited_once_and_not_read_before() -> None:
    (chunk,) = stage_of(dp=2, zero=3).chunks
    lines = chunk.forward.instructions
    at = next(k for k, i in enumerate(lines) if i.awaits)
    begun = lines[at].awaits
    check_waited(chunk.forward)
    for changed, message in (
        (lines[:at] + lines[at + 1 :], "nothing waits for"),
        (lines[: at + 1] + lines[at:], "not begun"),
        (lines[:at] + (replace(lines[at], awaits=None),) + lines[at + 1 :], "wait.* reads what .*begin_all_gather"),
    ):
        with pytest.raises(VerificationError, match=message):
            check_waited(replace(chunk.forward, instructions=changed))
    assert begun is not None


def test_printed_code_that_does_not_wait_is_found() -> None:
    code = planned(dp=2, zero=3).linked.stages[0].chunks[0]
    line = next(line for line in code.functions.splitlines() if "comm.wait(" in line)
    made, begun = line.split(" = ")[0].strip(), line.split("comm.wait(")[1].split(")")[0]
    with pytest.raises(VerificationError, match="printed = priced"):
        verify_emitted(replace(code, functions=code.functions.replace(line, f"    {made} = {begun}; del {begun}")))


def test_groups_that_begin_otherwise_than_priced_are_found() -> None:
    found = planned(dp=2, zero=0).linked
    source, stage = found.source(0), found.program.stages[0]
    verify_step(source, (), {}, stage.step)
    with pytest.raises(VerificationError, match="groups of gradients begin"):
        verify_step(source.replace('begin_gradients("dp"', 'begin_gradients("tp"', 1), (), {}, stage.step)


# --- What it costs


def moving(name: str, axis: str = "dp") -> Instruction:
    value = Value(name, TensorMeta((8,), "float32"), name, 32)
    return Instruction("begin", (), (value,), None, Collective("all_gather", axis, 32), 0, (), 0, begins=True)


def test_streams_by_hand() -> None:
    """Two gathers of 3 s, of which 1 s is the rank's own in any case, behind 1 s and 6 s of compute; a third on
    another axis."""
    streams = Streams()
    streams.begin(moving("a"), 3.0, 1.0)  # moves from 0 to 2
    streams.begin(moving("b"), 3.0, 1.0)  # moves from 2 to 4
    streams.begin(moving("c", "tp"), 5.0, 0.0)  # moves from 0 to 5
    streams.spend(1.0)
    assert streams.wait("a") == 2.0 and streams.now_s == 3.0  # 1 s is left, and 1 s of its own
    streams.spend(6.0)
    assert streams.wait("b") == 1.0 and streams.now_s == 10.0
    assert streams.wait("c") == 0.0


# --- It trains as one device does, in the memory that is estimated


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "pins",
    [
        {"dp": 2, "zero": 0},
        {"dp": 3, "zero": 3},
        {"dp": 2, "pp": 2, "zero": 0, "schedule": "zero_bubble", "microbatch_size": 1},
        pytest.param({"dp": 2, "zero": 2, "recompute": "full"}, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "tp": 2, "zero": 3, "recompute": "selective"}, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "pp": 2, "zero": 3, "virtual_stages": 2, "microbatch_size": 1}, marks=pytest.mark.slow),
        pytest.param({"tp": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parity(pins: dict[str, Any]) -> None:
    model, batch = example_gpt(torch.float64, tied=pins.get("tp", 1) == 1, n_layer=4 if "virtual_stages" in pins else 2)
    if pins.get("dp") == 3:
        batch = {name: torch.cat([value, value[:1]]) for name, value in batch.items()}
    devices = math.prod(pins.get(name, 1) for name in ("dp", "tp", "pp"))
    plan = check_parity(
        model, batch, devices, 1e-8, optimizer=ADAMW, **{"dp": 1, "tp": 1, "pp": 1, **pins}, overlap=True
    )
    assert plan.overlap


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("zero", [0, 3])
def test_on_real_ranks(zero: int) -> None:
    model, batch = example_gpt(n_embd=64, n_layer=3)
    pins = Parallelism(dp=2, tp=1, pp=1, zero=zero, microbatch_size=2, overlap=True)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=ADAMW, parallelism=pins) as exe:
        found = autopar.compare(exe, batch, 1, warmup=1)
    assert MEMORY_LOW <= found.peak_memory_error <= MEMORY_HIGH, found.peak_memory_error
    check_parity(
        *example_gpt(torch.float64),
        2,
        1e-8,
        optimizer=ADAMW,
        dp=2,
        tp=1,
        pp=1,
        zero=zero,
        microbatch_size=2,
        overlap=True,
    )


# --- The planner's choice


def test_it_is_chosen_where_it_is_faster_and_fits() -> None:
    """Slow links whose messages move behind compute; where nothing is known of that, or it does not fit, it is not."""
    model, batch = example_gpt(n_layer=4)
    pins = Parallelism(dp=2, tp=1, pp=1, zero=3, recompute="none", microbatch_size=2)
    estimate = functools.partial(autopar.estimate, model, inputs=batch, optimizer=ADAMW)
    moves = replace(cpu_cluster(2, 2e8), backend="nccl")
    plain, free = (estimate(cluster=moves, parallelism=replace(pins, overlap=o)) for o in (False, None))
    assert free.plan.overlap and free.step_time_s < 0.99 * plain.step_time_s
    assert any("collectives move behind compute" in note for note in free.notes)
    assert not estimate(cluster=cpu_cluster(2, 2e8), parallelism=pins).plan.overlap
    assert free.peak_bytes > plain.peak_bytes
    capped = estimate(cluster=moves, parallelism=pins, memory_cap=plain.peak_bytes)
    assert not capped.plan.overlap and capped.peak_bytes <= plain.peak_bytes
    with pytest.raises(InfeasiblePlanError, match="overlap=True"):
        estimate(cluster=moves, parallelism=replace(pins, overlap=True), memory_cap=plain.peak_bytes)


class Compared(nn.Module):
    """What all samples sum to, two sums at once, is read again by the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.a(x)
        return torch.atan2(values.sum(0), values.cos().sum(0)).pow(2).mean()


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("zero", [0, 3])
def test_sums_over_replicas_that_are_saved_keep_their_names(zero: int) -> None:
    torch.manual_seed(0)
    model, batch = Compared().double(), {"x": torch.randn(8, 8, dtype=torch.float64)}
    plan = check_parity(model, batch, 2, 1e-9, dp=2, zero=zero, overlap=True)
    assert plan.overlap
