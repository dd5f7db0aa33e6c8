"""Parameters and buffers that forward reaches by another way than the module that registers them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import cpu_cluster, largest_error
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from cost_model.errors import UnsupportedError

SGD = functools.partial(torch.optim.SGD, lr=0.1)
DP2, TP2 = {"dp": 2, "tp": 1, "pp": 1}, {"dp": 1, "tp": 2, "pp": 1}
Read = Callable[["Net"], Callable[[], Tensor]]


class Net(nn.Module):
    """read: makes what forward calls beside its layers."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.double()
        self.kept: list[Any] = []
        self.read = read(self)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.last(torch.tanh(self.first(x))))
        return (h * self.read()).square().mean()


def listed(net: Net) -> Callable[[], Tensor]:
    net.kept = [net.first.weight, {"bias": net.last.bias}]
    return lambda: net.kept[0].sum() + net.kept[1]["bias"]


def closed_over(net: Net) -> Callable[[], Tensor]:
    weight = net.last.weight
    return lambda: weight.t().sum(0)


def view_of_values(net: Net) -> Callable[[], Tensor]:
    net.kept = [net.first.weight.detach()[1:3].t()]
    return lambda: net.kept[0].sum(1)


def statistics(net: Net) -> Callable[[], Tensor]:
    mean = net.norm.running_mean
    assert mean is not None
    return lambda: 1 + mean


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()}


@pytest.mark.parametrize(("deferred", "pins"), [(False, DP2), (True, TP2)], ids=["with values", "deferred"])
@pytest.mark.parametrize("read", [listed, closed_over, view_of_values, statistics])
@pytest.mark.usefixtures("thread_ranks")
def test_what_is_read_elsewhere_is_what_is_registered(read: Read, deferred: bool, pins: Any) -> None:
    model, losses = Net(read), []
    update = SGD(model.parameters())
    for _ in range(3):
        update.zero_grad()
        loss = model(**batch())
        loss.backward()
        update.step()
        losses.append(float(loss.detach()))
    made = autopar.deferred(Net, read) if deferred else Net(read)
    parallelism = autopar.Parallelism(**pins)
    with autopar.compile(made, cpu_cluster(2), batch(), optimizer=SGD, parallelism=parallelism) as exe:
        assert [exe.step(batch()) for _ in range(3)] == pytest.approx(losses, rel=1e-9)
        assert largest_error(exe.full_state_dict(), model.state_dict()) < 1e-9


def test_what_was_computed_from_parameters_before_forward_is_refused() -> None:
    def computed(net: Net) -> Callable[[], Tensor]:
        twice = 2 * net.last.bias
        return lambda: twice

    with pytest.raises(UnsupportedError, match=r"a tensor \[4\] that was computed from parameters outside of it"):
        autopar.estimate(Net(computed), cpu_cluster(2), batch(), optimizer=SGD)
