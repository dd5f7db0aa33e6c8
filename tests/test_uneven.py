"""Stages on devices of several kinds: more segments on the faster, fewer where memory is small, never slower for it."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from parity import largest_error
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar.options import Options
from autopar.planner.solution import Solution
from autopar.planner.virtual import shortest_ends
from autopar.planning import Job
from autopar.uneven import CutSketch, cut_at, fitted
from cost_model.cluster import Cluster
from cost_model.device import Device
from cost_model.memory import StagePeaks, allocator_rounding, stage_peak
from cost_model.network import Network
from cost_model.simulate import simulate

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GIB = 2**30


class Chain(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x.square().mean()


def regions(*kinds: tuple[Device, int], gbits: float = 1000.0) -> Cluster:
    """A region of each kind: so many nodes of one device, all links alike but slower between regions."""
    count = len(kinds)
    rates = tuple(tuple(gbits / 8 * 1e9 / (1 if a == b else 4) for b in range(count)) for a in range(count))
    delays = tuple(tuple(1e-4 if a == b else 1e-3 for b in range(count)) for a in range(count))
    region_of = tuple(region for region, (_, nodes) in enumerate(kinds) for _ in range(nodes))
    every = tuple(range(len(region_of)))
    network = Network(
        tuple(f"region {r}" for r in range(count)), delays, rates, region_of, every, (None,) * len(every), 1e-5
    )
    return Cluster("mixed", tuple(kind for kind, nodes in kinds for _ in range(nodes)), (), "nccl", network)


def job_of(cluster: Cluster, width: int = 2048, layers: int = 30, **pins: int | tuple[int, ...]) -> Job:
    with torch.device("meta"):
        model, x = Chain(width, layers).half(), torch.empty(1024 * cluster.num_devices, width, dtype=torch.float16)
    parallelism = autopar.Parallelism(**{"tp": 1, "zero": 0, "recompute": "none", **pins})  # type: ignore[arg-type]
    return Job.of(model, cluster, {"x": x}, Options.of(None, SGD, parallelism, None, None, None))


FAST, SLOW = Device.load("a100-sxm-40gb"), Device.load("v100-sxm2-16gb")


def solved(job: Job) -> Solution:
    return job.solve()


def sizes(solution: Solution) -> list[int]:
    return [stage.last - stage.first for stage in solution.stages]


def step_s(job: Job, solution: Solution) -> float:
    return job.step_s(job.plan(solution))


@pytest.mark.parametrize(("slow", "most", "ends"), [
    ([1.0, 1.0], [6, 6], (3, 6)),
    ([1.0, 2.0], [6, 6], (4, 6)),
    ([2.0, 1.0], [6, 6], (2, 6)),
    ([1.0, 2.0], [3, 6], (3, 6)),
    ([1.0, 1.0, 4.0], [6, 6, 6], (2, 5, 6)),
    ([1.0, 1.0], [2, 3], None),
])  # fmt: skip
def test_the_longest_part_is_as_short_as_it_can_be(
    slow: list[float], most: list[int], ends: tuple[int, ...] | None
) -> None:
    assert shortest_ends([1.0] * 6, slow, most) == ends


@pytest.mark.parametrize("first", [FAST, SLOW], ids=["fast first", "slow first"])
def test_the_faster_devices_have_more_of_the_model(first: Device) -> None:
    """Eight of each kind: whichever stages they are, theirs are as long as the others' take."""
    other = SLOW if first is FAST else FAST
    job = job_of(regions((first, 8), (other, 8)), pp=4, dp=4, microbatch_size=512)
    found = solved(job)
    speed = SLOW.product_s("float16") / FAST.product_s("float16")
    assert found.placement is not None
    of_stage = [{job.cluster.devices[d] for d in found.placement[4 * s : 4 * s + 4]} for s in range(4)]
    fast = [size for size, devices in zip(sizes(found), of_stage, strict=True) if devices == {FAST}]
    slow = [size for size, devices in zip(sizes(found), of_stage, strict=True) if SLOW in devices]
    assert len(fast) == len(slow) == 2 and 0.5 * speed < sum(fast) / sum(slow) < 1.5 * speed
    even = cut_at(found, tuple(len(job.traced.segments) * (stage + 1) // 4 for stage in range(4)))
    assert step_s(job, found) < 0.95 * step_s(job, even)


def test_no_placement_is_slower_than_with_even_stages() -> None:
    """16 devices of two kinds in three regions, as searched, by hand and at random."""
    job = job_of(regions((FAST, 3), (SLOW, 7), (FAST, 6)), pp=4, dp=4, microbatch_size=512)
    found = solved(job)
    best_s = step_s(job, found)
    draw = torch.Generator().manual_seed(0)
    tried = [tuple(range(16)), *(tuple(torch.randperm(16, generator=draw).tolist()) for _ in range(3))]
    even = cut_at(found, tuple(len(job.traced.segments) * (stage + 1) // 4 for stage in range(4)))
    for placement in (found.placement, *tried):
        own = replace(even, placement=placement)
        assert min(step_s(job, each) for each in fitted(job, own, lambda: math.inf)) <= step_s(job, own)
        assert best_s <= step_s(job, own)


def test_small_memory_holds_fewer_segments_though_no_even_plan_fits() -> None:
    """Parameters and gradients of 31 products of 8 MiB each: equal stages need a quarter of them on every device."""
    large, small = (SLOW.with_memory(SLOW.reserve_bytes + int(room * GIB)) for room in (0.25, 0.085))
    job = job_of(regions((large, 2), (small, 2)), pp=4, dp=1, microbatch_size=16)
    found = solved(job)
    plan = job.plan(found)
    assert all(peak <= cap for peak, cap in zip(job.peaks(plan), job.stage_caps(plan), strict=True))
    assert plan.memory_cap_bytes == large.usable_bytes
    of_stage = [job.cluster.devices[devices[0]] for devices in plan.stage_devices]
    rooms = dict(zip(sizes(found), of_stage, strict=True))
    assert rooms[max(rooms)] == large and rooms[min(rooms)] == small
    even = job.plan(cut_at(found, tuple(len(job.traced.segments) * (stage + 1) // 4 for stage in range(4))))
    assert any(peak > cap for peak, cap in zip(job.peaks(even), job.stage_caps(even), strict=True))
    again = replace(job.options, plan=plan)
    job.options = again
    assert job.decide(0.0).plan == plan


def test_a_pinned_placement_has_stages_by_speed_too() -> None:
    cluster = regions((SLOW, 2), (FAST, 2))
    found = solved(job_of(cluster, pp=4, dp=1, microbatch_size=512, placement=(0, 1, 2, 3)))
    assert max(sizes(found)[:2]) < min(sizes(found)[2:])
    assert math.isfinite(simulate(job_of(cluster).program(job_of(cluster).plan(found)), cluster).step_time_s)


@functools.cache
def even() -> tuple[Job, Solution]:
    job = job_of(regions((SLOW, 4)), dp=1, tp=1, pp=4, microbatch_size=8)
    return job, solved(job)


def test_a_sketch_of_another_cut_is_near_its_program() -> None:
    """As segments are priced alone and in a program they differ a little; the plan's own cut is exact."""
    job, found = even()
    sketch = CutSketch(job, found)
    assert sketch.seconds(found) == pytest.approx(step_s(job, found), rel=1e-9)
    ends = [stage.last for stage in found.stages]
    for moved in ([ends[0] + 3, *ends[1:]], [*ends[:2], ends[2] - 4, ends[3]]):
        other = cut_at(found, tuple(moved))
        assert step_s(job, other) > 1.02 * step_s(job, found)
        assert sketch.seconds(other) == pytest.approx(step_s(job, other), rel=0.02)


def test_peaks_of_alike_stages_are_those_of_each_alone() -> None:
    job, found = even()
    program = job.program(job.plan(found))
    rounding = allocator_rounding("cuda")
    together = StagePeaks(program.stages, rounding)
    for schedule, window in (("1f1b", 1), ("1f1b", 3), ("gpipe", 1)):
        shape = (program.pp, program.microbatches, schedule)
        alone = [stage_peak(stage, *shape, rounding, window) for stage in program.stages]
        assert together.under(*shape, window) == alone
        assert len({peak.memory.total_bytes for peak in alone}) > 1


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize(
    ("kinds", "ends", "pins"),
    [
        (["a64fx", "cpu"], (2, 6), {"pp": 2, "schedule": "gpipe"}),
        pytest.param(["cpu", "a64fx", "cpu"], (3, 4, 6), {"pp": 3, "schedule": "1f1b"}, marks=pytest.mark.slow),
        pytest.param(
            ["a64fx", "cpu", "cpu", "a64fx"],
            (2, 6),
            {"pp": 2, "dp": 2, "zero": 1, "placement": (0, 3, 1, 2)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["2 ranks", "3 ranks", "4 ranks"],
)
def test_real_ranks_with_uneven_stages_have_the_numbers_of_one_device(
    kinds: list[str], ends: tuple[int, ...], pins: dict[str, Any]
) -> None:
    """The plan is cut by hand: fewer layers on the slower of two kinds of CPUs."""
    draw = torch.Generator().manual_seed(0)
    model = Chain(16, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(16, 16, generator=draw) * 0.2)
    batch = {"x": torch.randn(12, 16, generator=draw)}
    delays, rates = (np.full((len(kinds),) * 2, value) for value in (1e-4, 1e9))
    cluster = Cluster.from_matrix(device=kinds, latency_s=delays, bandwidth_bytes_per_s=rates)
    parallelism = autopar.Parallelism(**{"tp": 1, "dp": 1, "microbatch_size": 2, **pins})
    job = Job.of(model, cluster, batch, Options.of(None, SGD, parallelism, None, None, None))
    plan = job.plan(cut_at(solved(job), ends))
    assert tuple(stage.last_segment for stage in plan.stages) == ends
    with autopar.compile(copy.deepcopy(model), cluster, batch, optimizer=SGD, plan=plan) as exe:
        found, state = [exe.step(batch) for _ in range(3)], exe.full_state_dict()
    update, losses = SGD(model.parameters()), []
    for _ in range(3):
        update.zero_grad()
        losses.append(model(**batch))
        losses[-1].backward()
        update.step()
    assert found == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    assert largest_error(state, dict(model.state_dict())) < 1e-5


def test_a_plan_leaves_room_for_the_window_that_hides_a_delay() -> None:
    """What 1f1b holds in its own window fills the memory with saved values; with some made again a wider one fits."""
    delays = tuple(tuple(1e-4 if a == b else 0.02 for b in range(2)) for a in range(2))
    network = regions((SLOW, 2), (SLOW, 2)).network
    assert network is not None
    cluster = Cluster("far", (SLOW,) * 4, (), "nccl", replace(network, latency_s=delays))
    seconds = {}
    for name, recompute in (("free", None), ("full", "full")):
        job = job_of(cluster, pp=4, dp=1, microbatch_size=256, recompute=recompute)
        job = job.under(job.options.parallelism, 260 * 2**20)
        found = solved(job)
        seconds[name] = step_s(job, found)
        assert found.configuration.window > 1, name
    assert seconds["free"] <= seconds["full"]
