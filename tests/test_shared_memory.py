"""Registered tensors in one memory that are several: a change of one is a change of the others on one device alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from cost_model.errors import TraceError, UnsupportedError
from passes.trace import trace


class Net(nn.Module):
    def __init__(self, change: Callable[[Net], None]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(2, 4))
        self.constant = torch.zeros(4)
        change(self)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.add_(x.mean(0))
        return (self.last(self.first(x)) + self.seen[1]).square().mean()


def tied_by_data(net: Net) -> None:
    net.last.weight.data = net.first.weight.data


def part(net: Net) -> None:
    net.rows = nn.Parameter(net.first.weight.data[2:], requires_grad=False)


def buffer(net: Net) -> None:
    net.register_buffer("before", net.last.bias.data)


def buffers(net: Net) -> None:
    net.register_buffer("top", net.seen[0])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (tied_by_data, "'first.weight' and 'last.weight'"),
        (part, "'rows' and 'first.weight'"),
        (buffer, "'last.bias' and 'before'"),
        (buffers, "'seen' and 'top'"),
    ],
)
def test_tensors_that_change_with_others_are_refused(change: Callable[[Net], None], names: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{names} are different tensors in the same memory"):
        trace(Net(change), {"x": torch.ones(4, 4)})


def test_parts_of_one_memory_that_have_nothing_in_common_are_tensors_as_any() -> None:
    def halves(net: Net) -> None:
        whole = torch.rand(4, 8)
        net.first.weight, net.last.weight = nn.Parameter(whole[:, :4]), nn.Parameter(whole[:, 4:])

    traced = trace(Net(halves), {"x": torch.ones(4, 4)})
    assert {"first.weight", "last.weight"} <= {i.target for i in traced.global_graph.inputs if i.trainable}


class TwoNames(nn.Module):
    """A batch norm and a buffer that is no part of the state dict, each registered twice and written to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.again = self.norm
        self.register_buffer("seen", torch.zeros(4), persistent=False)
        self.register_buffer("same", self.seen, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.add_(x.mean(0))
        return (self.again(torch.tanh(self.norm(self.layer(x)))) + self.same).square().mean()


@pytest.mark.usefixtures("thread_ranks")
def test_buffers_of_two_names_are_one() -> None:
    batch = {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(1))}
    check_parity(TwoNames(), batch, 2, 1e-4, dp=2, tp=1, pp=1)
    assert {
        entry.target for entry in trace(autopar.deferred(TwoNames), batch).global_graph.inputs if entry.changes
    } == {
        "norm.running_mean",
        "norm.running_var",
        "seen",
    }


def test_constants_that_forward_writes_to_are_refused_with_the_line() -> None:
    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.constant.add_(1)
            return (self.last(x) + self.constant).square().mean()

    with pytest.raises(TraceError, match="constant is mutated"):
        trace(Written(lambda net: None), {"x": torch.ones(4, 4)})
