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


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("build", [gpt, wide])
def test_the_last_stage_reserves_what_gradients_of_its_output_take(build: Any, pp: int) -> None:
    """Never more than the program needs, and most of it: search would propose plans that do not fit, one by one."""
    pins = Parallelism(1, 1, pp, zero=0, recompute="none", schedule="1f1b")
    model, inputs = build()
    job = Job.of(model, Cluster.load("dgx-a100-80gb", pp), inputs, Options.of(None, ADAMW, pins, None, None, None))
    found = job.solve()
    assert isinstance(found, Solution)
    c, last = found.configuration, found.stages[-1]
    chain = job.pinned_space().chain(c.dp, c.tp, c.microbatch_size)
    assert chain is not None
    reserve = chain.reserve_bytes(last.first, last.last)
    assert reserve > chain.reserve_bytes(0, 1)
    need, peak = last.state_bytes + last.saved_bytes + reserve, job.peaks(job.plan(found))[-1]
    assert 0.75 * peak <= need <= peak
