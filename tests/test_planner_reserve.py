"""What the search reserves for a stage beside state and saved values, against the liveness of the rewritten program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import example_gpt
from parity import ADAMW
from torch import nn

from autopar.options import Options
from autopar.planner.solution import Solution
from autopar.planning import Job
from cost_model.cluster import Cluster
from cost_model.parallelism import Parallelism


class Wide(nn.Module):
    """A narrow body before a wide output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(4)))
        self.out = nn.Linear(32, 4096)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.out(self.body(x)), y)


def gpt() -> tuple[nn.Module, Any]:
    return example_gpt(n_layer=3, n_embd=32, vocab_size=4000)


def wide() -> tuple[nn.Module, Any]:
    return Wide(), {"x": torch.randn(64, 32), "y": torch.randn(64, 4096)}


def solved(model: nn.Module, inputs: Any, pins: Parallelism) -> tuple[Job, Solution]:
    """On as many devices as the pins take."""
    assert isinstance(pins.tp, int) and isinstance(pins.pp, int)
    cluster = Cluster.load("dgx-a100-80gb", pins.tp * pins.pp)
    job = Job.of(model, cluster, inputs, Options.of(None, ADAMW, pins, None, None, None))
    found = job.solve()
    assert isinstance(found, Solution)
    return job, found


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("build", [gpt, wide])
def test_the_last_stage_reserves_what_gradients_of_its_output_take(build: Any, pp: int) -> None:
    """Never more than the program needs, and most of it: search would propose plans that do not fit, one by one."""
    pins = Parallelism(1, 1, pp, zero=0, recompute="none", schedule="1f1b")
    job, found = solved(*build(), pins)
    c, last = found.configuration, found.stages[-1]
    chain = job.pinned_space().chain(c.dp, c.tp, c.microbatch_size)
    assert chain is not None
    reserve = chain.reserve_bytes(last.first, last.last)
    assert reserve > chain.reserve_bytes(0, 1)
    need, peak = last.state_bytes + last.saved_bytes + reserve, job.peaks(job.plan(found))[-1]
    assert 0.75 * peak <= need <= peak


class Tall(nn.Module):
    """Many rows for small weights, half of them read through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = nn.functional.gelu(x @ layer.weight.t()) + layer(x)
        return nn.functional.mse_loss(x, y)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_that_are_gathered_over_tp_are_held_until_backward(recompute: str) -> None:
    """Rows split over tp as well, each rank with half of a weight: what a forward gathers its backward reads."""
    pins = Parallelism(1, 2, 1, zero=0, recompute=recompute, schedule="1f1b")
    job, found = solved(Tall(), {"x": torch.randn(4096, 64), "y": torch.randn(4096, 64)}, pins)
    plan = job.plan(found)
    chunk = job.program(plan).stages[0].chunks[0]
    made = [(i, value) for i in chunk.forward.instructions for value in i.outputs if value.storage in chunk.saved]
    assert any(i.collective for i, _ in made), "the plan gathers no weight: the test shows nothing"
    of_inputs = sum(value.storage_bytes for i, value in made if i.inputs == ("y",))  # which the search does not count
    (memory,) = (peak.memory for peak in job._stage_peaks(plan))
    (stage,) = found.stages
    assert stage.saved_bytes == pytest.approx(memory.saved - of_inputs * (recompute == "full"), rel=0.03)


class Adapted(nn.Module):
    """A frozen trunk, the upper layers of which have adapters: the lower ones have no backward, and no product with a
    frozen weight needs what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(nn.Linear(64, 64) for _ in range(6)).requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(64, 4, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(4, 64, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.trunk[:3]:
            x = nn.functional.gelu(layer(x))
        for layer, down, up in zip(self.trunk[3:], self.down, self.up, strict=True):
            x = nn.functional.gelu(layer(torch.tanh(x)) + up(down(x)) * 0.5)
        return nn.functional.mse_loss(x, y)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_frozen_weights_multiply_is_not_held(recompute: str) -> None:
    pins = Parallelism(1, 1, 1, zero=0, recompute=recompute, schedule="1f1b")
    job, found = solved(Adapted(), {"x": torch.randn(512, 64), "y": torch.randn(512, 64)}, pins)
    (memory,) = (peak.memory for peak in job._stage_peaks(job.plan(found)))
    assert found.stages[0].saved_bytes == pytest.approx(memory.saved, rel=0.03)
