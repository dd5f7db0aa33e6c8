"""Specialising to a batch size gives what a fresh trace at that size gives; numbers keep the global batch's value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import example_gpt, hf_gpt2
from odd_models import Net, inputs, net
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

from passes.graph import ModelGraph
from passes.specialise import BatchMismatchError, changed_sizes, specialise, twins
from passes.trace import Traced, trace


def _class_token() -> tuple[nn.Module, dict[str, Tensor]]:
    def build(self: Any) -> None:
        self.token = nn.Parameter(torch.zeros(1, 1, 12, dtype=torch.float64))

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        row = torch.cat([self.token.expand(x.size(0), -1, -1), x.unsqueeze(1)], 1)
        return F.mse_loss(self.body(row).flatten(0, 1).view(x.size(0), 2, 12).sum(1), y)

    return net(forward, build), inputs()


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "fused": example_gpt,
    "explicit": lambda: example_gpt(attention="explicit", fused_qkv=False),
    "gpt2-eager": lambda: hf_gpt2("eager"),
    "gpt2-sdpa": lambda: hf_gpt2("sdpa"),
    "class token": _class_token,
}


@functools.cache
def _traced(name: str) -> tuple[nn.Module, dict[str, Tensor], Traced]:
    model, given = MODELS[name]()
    return model, given, trace(model, given)


def _nearest() -> tuple[nn.Module, dict[str, Tensor]]:
    """Distances of more than 25 rows are products, of fewer they are not."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        near = torch.cdist(self.a(x).view(-1, 1), self.b.weight[0].view(-1, 1)).square().mean(1)
        return F.mse_loss(near.view(x.size(0), -1).sum(1), y[:, 0])

    return net(forward), inputs()


def test_what_few_samples_do_otherwise_is_traced_at_more() -> None:
    model, given = _nearest()
    traced = trace(model, given)
    assert traced.other is not None and traced.other.batch == 4
    assert specialise(traced, 2).batch == 2


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("pins", [{"dp": 2}, {"pp": 2, "microbatch_size": 2}], ids=str)
def test_parts_do_what_the_whole_batch_does(pins: dict[str, int]) -> None:
    check_parity(*_nearest(), 2, 1e-9, functools.partial(torch.optim.SGD, lr=0.1), **pins)


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_a_fresh_trace(name: str, batch: int) -> None:
    """At size 1 a fresh trace would drop dims of size 1, so only the sizes below are compared there."""
    model, given, traced = _traced(name)
    found = specialise(traced, batch)
    assert found.batch == batch
    if batch == 1:
        assert all(found.tensor(i.node).shape[0] == 1 for i in found.inputs if i.batched)
        return
    fresh = trace(model, {k: v[:batch] for k, v in given.items()}).global_graph
    pairs = twins(found, fresh)
    assert [changed_sizes(a, b) for a, b in pairs.items()] == [[]] * len(pairs)
    assert dict(found.metas) == {name: fresh.metas[name] for name in found.metas}
    assert found.inputs == fresh.inputs and found.outputs == fresh.outputs


def test_the_global_batch_is_the_trace_itself() -> None:
    traced = trace(*example_gpt())
    assert specialise(traced, 8) is traced.global_graph


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_loss_over_the_batch_size_stays_global(batch: int) -> None:
    model = net(lambda self, x, y: (self.body(x) - y).pow(2).sum() / x.size(0))
    (division,) = _calls(specialise(trace(model, inputs()), batch), "aten.div.Tensor")
    assert division.args[1] == 8


def test_a_mean_is_over_the_global_batch() -> None:
    (scaling,) = _calls(specialise(trace(Net(), inputs()), 2), "aten.mul.Tensor")
    assert scaling.args[1] == 1 / (8 * 12)


def test_sizes_of_factories_follow_the_batch() -> None:
    model = net(lambda self, x, y: F.mse_loss(self.body(x) * torch.arange(x.size(0) * 2)[::2, None], y))
    (counted,) = _calls(specialise(trace(model, inputs()), 4), "aten.arange.default")
    assert counted.args == (8,)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, y: F.mse_loss(self.body(torch.tanh(x) if x.size(0) == 8 else x), y),
        lambda self, x, y: F.mse_loss(self.body(x).sum(1, keepdim=x.size(0) == 8).sum(), y.sum()),
        lambda self, x, y: F.mse_loss((self.a if x.size(0) == 8 else self.b)(x), y),
    ],
    ids=["other ops", "another flag", "another weight"],
)
def test_control_flow_on_the_batch_size_is_found(forward: Any) -> None:
    with pytest.raises(BatchMismatchError):
        specialise(trace(net(forward), inputs()), 4)


def test_sizes_that_are_no_whole_number_are_found() -> None:
    model = net(lambda self, x, y: self.body(x).view(x.size(0) // 2, 2, 12).sum(1).pow(2).sum())
    traced = trace(model, inputs())
    assert specialise(traced, 4).batch == 4
    with pytest.raises(BatchMismatchError, match="whole number"):
        specialise(traced, 3)


def _calls(model: ModelGraph, op: str) -> list[Any]:
    return [n for n in model.nodes() if str(n.target) == op]
