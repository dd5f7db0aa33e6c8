"""Branches of ``torch.cond``: the one that is taken counts, whatever the other would make of its operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_models import inputs, net
from parity import check_parity, cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor

import autopar
from cost_model.errors import UnsupportedError
from passes.trace import trace


def _counting(self: Any) -> None:
    self.register_buffer("steps", torch.zeros((), dtype=torch.float64))


def _warming(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Another layer from the second step on, and roots of what is negative until then."""
    self.steps += 1
    later = self.steps > 1.5
    h = torch.cond(later, lambda z: self.a(z).relu(), lambda z: self.b(z).tanh(), (x,))
    z, w = torch.cond(later, lambda u, k: (u.exp(), u * k), lambda u, k: (u.abs().sqrt(), u / k), (h, y.sign().long()))
    return F.mse_loss(self.c(z * 0.1 + w), y) + torch.cond(self.training, lambda: 1.0, lambda: 2.0, ())


def _rooted(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """The untaken root has no finite slope at what the other branch is given."""
    made = self.body(x)
    zeros = made - made
    return F.mse_loss(torch.cond(y.sum() < 1e9, lambda z, h: z + h, lambda z, h: z.sqrt() + h, (zeros, made)), y)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("forward", [_warming, _rooted])
@pytest.mark.parametrize("pins", [{"dp": 2, "tp": 1, "pp": 1}, {"dp": 1, "tp": 2, "pp": 1}], ids=str)
def test_a_branch_is_that_of_one_device(forward: Any, pins: dict[str, int]) -> None:
    check_parity(net(forward, _counting), inputs(), 2, 1e-9, **pins)


def test_both_branches_are_said_to_be_computed() -> None:
    notes = autopar.estimate(net(_warming, _counting), cpu_cluster(1), inputs()).notes
    assert "both branches of 2 torch.cond are computed, of which one is chosen" in notes


@pytest.mark.parametrize(
    ("false_fn", "said"),
    [
        (lambda z: z[:1], "equal shapes"),
        (lambda z: (z,), "return one form"),
        (lambda z: 3, "return tensors"),
    ],
)
def test_branches_that_return_others_are_refused(false_fn: Any, said: str) -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda z: z * 1.0, false_fn, (self.body(x),)).mean()

    with pytest.raises(UnsupportedError, match=said):
        trace(net(forward), inputs())
