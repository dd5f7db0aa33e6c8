"""Gradients summed in groups of neighbouring replicas, across the groups and back: the same numbers, other messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import SGD, largest_error, reference
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar.options import Options
from autopar.planning import Job
from cost_model.cluster import Cluster
from cost_model.device import Device
from cost_model.errors import ConfigError
from cost_model.network import Network
from cost_model.program import Collective

WIDTH = 12
BATCH = {"x": torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def regions(replicas: int, count: int, near: float = 1e10, far: float = 1e6) -> Cluster:
    """As many replicas in each of some regions, far from each other."""
    rates = tuple(tuple(near if a == b else far for b in range(count)) for a in range(count))
    delays = tuple(tuple(1e-6 if a == b else 1e-3 for b in range(count)) for a in range(count))
    every = tuple(range(replicas * count))
    region_of = tuple(index // replicas for index in every)
    names = tuple(map(str, range(count)))
    network = Network(names, delays, rates, region_of, every, (None,) * len(every), 1e-6)
    return Cluster("regions", (Device.load("cpu"),) * len(every), (), "gloo", network)


def compiled(model: nn.Module, cluster: Cluster, **pins: Any) -> autopar.Executable:
    parallelism = autopar.Parallelism(**{"tp": 1, "pp": 1, "zero": 0, "microbatch_size": 2, **pins})
    return autopar.compile(model, cluster, BATCH, optimizer=SGD, parallelism=parallelism)


def check(cluster: Cluster, **pins: Any) -> None:
    losses, trained = reference(Chain(), BATCH, SGD)
    with compiled(Chain(), cluster, **pins) as exe:
        exe.planned.linked.verify()
        found = [exe.step(BATCH) for _ in range(3)]
        state = exe.full_state_dict()
    assert exe.plan.dp_inner == pins["dp_inner"]
    assert found == pytest.approx(losses, rel=1e-9)
    assert largest_error(state, dict(trained.state_dict())) < 1e-9


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "pins", [{"dp": 4, "dp_inner": 2}, {"dp": 2, "pp": 2, "dp_inner": 1}, {"dp": 4, "tp": 2, "dp_inner": 2}], ids=str
)
def test_numbers_are_those_of_one_device(pins: dict[str, Any]) -> None:
    devices = pins["dp"] * pins.get("pp", 1) * pins.get("tp", 1)
    check(regions(devices // 2, 2), **pins)


@pytest.mark.usefixtures("shared_ranks")
def test_real_ranks() -> None:
    check(regions(2, 2), dp=4, dp_inner=2)


def planned(model: nn.Module, cluster: Cluster, **pins: Any) -> autopar.Estimate:
    batch = {"x": torch.empty(8 * cluster.num_devices, WIDTH, dtype=torch.float64)}
    parallelism = autopar.Parallelism(**{"tp": 1, "pp": 1, "zero": 0, "dp": cluster.num_devices, **pins})
    return autopar.estimate(model, cluster, batch, optimizer=SGD, parallelism=parallelism)


def reductions(replicas: int, count: int, **pins: Any) -> list[Collective]:
    """Of a step, the sum of losses left out."""
    cluster = regions(replicas, count)
    options = Options.of(
        None, SGD, autopar.Parallelism(dp=replicas * count, tp=1, pp=1, zero=0, **pins), None, None, None
    )
    job = Job.of(Chain(), cluster, {"x": torch.empty(8 * replicas * count, WIDTH, dtype=torch.float64)}, options)
    (stage,) = job.program(job.decide(0.0).plan).stages
    return [c for c in stage.step.collectives if c.axis != "world"]


def test_the_program_says_what_is_summed_where() -> None:
    whole = 4 * WIDTH * WIDTH * 8
    assert reductions(3, 2, dp_inner=3) == [
        Collective("reduce_scatter", "dp1", whole),
        Collective("all_reduce", "dp0", whole // 3),
        Collective("all_gather", "dp1", whole),
    ]
    assert reductions(3, 2, dp_inner=1) == [Collective("all_reduce", "dp", whole)]
    assert reductions(5, 2, dp_inner=5) == [Collective("all_reduce", "dp", whole)], "which five do not divide"


def test_links_between_regions_carry_a_part() -> None:
    """Four replicas in each of two regions: a quarter crosses, once each way, where a ring takes all of it round."""
    cluster, every = regions(4, 2), tuple(range(8))
    flat, grouped = (planned(Chain(), cluster, dp_inner=inner).step_time_s for inner in (1, 4))
    whole = 4 * WIDTH * WIDTH * 8
    steps = [("reduce_scatter", whole, every[:4]), ("all_reduce", whole // 4, (0, 4)), ("all_gather", whole, every[:4])]
    grouped_s = sum(cluster.collective_time_s(*step) for step in steps)
    assert flat - grouped == pytest.approx(cluster.collective_time_s("all_reduce", whole, every) - grouped_s)
    assert flat - grouped > 0.25 * flat


def test_the_planner_groups_replicas_by_region() -> None:
    found = planned(Chain(), regions(4, 3))
    assert found.plan.dp_inner == 4
    assert found.step_time_s < planned(Chain(), regions(4, 3), dp_inner=1).step_time_s
    assert planned(Chain(), regions(12, 1)).plan.dp_inner == 1


def test_groups_must_divide_the_replicas() -> None:
    with pytest.raises(ConfigError, match="a plan of dp=4 cannot have dp_inner=3"):
        planned(Chain(), regions(2, 2), dp_inner=3)


def test_groups_that_sum_nothing_are_said_to() -> None:
    pins = {"dp": 4, "dp_inner": 2}
    notes = {zero: " ".join(planned(Chain(), regions(2, 2), **pins, zero=zero).notes) for zero in (0, 3)}
    assert "dp_inner=2 has no effect" in notes[3] and "dp_inner" not in notes[0]
