"""What stands around a step: autocast regions, and losses that are modules."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from parity import cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from cost_model.errors import ConfigError, TraceError
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)
DP2 = autopar.Parallelism(dp=2, tp=1, pp=1)
BATCH = {"x": torch.linspace(-1, 1, 32).view(8, 4)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()  # type: ignore[no-any-return]


class Outputs(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Loss(nn.Module):
    """Weighted by a buffer and a frozen parameter."""

    def __init__(self, trains: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 3.0), requires_grad=trains)
        self.register_buffer("weights", torch.arange(1.0, 5.0))
        self.calls = 0

    def forward(self, outputs: Tensor, inputs: Any) -> Tensor:
        return ((outputs - inputs["x"]).square() * self.weights * self.scale).mean()


class Counting(Loss):
    def forward(self, outputs: Tensor, inputs: Any) -> Tensor:
        self.calls += 1
        return super().forward(outputs, inputs) * self.calls


class Moving(Loss):
    def forward(self, outputs: Tensor, inputs: Any) -> Tensor:
        self.weights.add_(1)
        return super().forward(outputs, inputs)


@pytest.mark.usefixtures("thread_ranks")
def test_a_plan_has_the_autocast_that_it_was_made_under() -> None:
    on = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with autopar.compile(Net(), cpu_cluster(2), optimizer=SGD, parallelism=DP2) as exe:
        with on():
            assert exe.step(BATCH) == pytest.approx(float(Net()(**BATCH).detach()), rel=1e-2)
        with pytest.raises(ConfigError, match="autocast is off here and casts to bfloat16 on cpu where the plan"):
            exe.step(BATCH)
    with autopar.compile(Net(), cpu_cluster(2), BATCH, optimizer=SGD, parallelism=DP2) as exe:
        assert exe.step(BATCH) == pytest.approx(float(Net()(**BATCH).detach()), rel=1e-6)
        with on(), pytest.raises(ConfigError, match="casts to bfloat16 on cpu here and is off where the plan"):
            exe.step(BATCH)


@pytest.mark.usefixtures("thread_ranks")
def test_a_loss_that_is_a_module_has_its_tensors_as_constants() -> None:
    model, losses = Outputs(), []
    update = SGD(model.parameters())
    for _ in range(2):
        loss = Loss()(model(**BATCH), BATCH)
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(float(loss.detach()))
    with autopar.compile(Outputs(), cpu_cluster(2), BATCH, loss_fn=Loss(), optimizer=SGD, parallelism=DP2) as exe:
        assert [exe.step(BATCH) for _ in range(2)] == pytest.approx(losses, rel=1e-6)
        assert set(exe.full_state_dict()) == set(model.state_dict())


def test_what_a_loss_would_lose_is_refused_or_noted() -> None:
    with pytest.raises(ConfigError, match="loss_fn has a parameter 'scale' that is none of the model's"):
        trace(Outputs(), BATCH, Loss(trains=True))
    with pytest.raises(TraceError, match="mutated"):
        trace(Outputs(), BATCH, Moving())
    (note,) = trace(Outputs(), BATCH, Counting()).notes
    assert "forward changes 'loss_fn.calls'" in note
