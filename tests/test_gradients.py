"""Where gradients stop, start twice or never come: every rank trains as one device does, weight decay included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_models import Net, inputs, labels, net
from parity import check_parity
from random_prices import draw_prices
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

GRIDS: list[dict[str, Any]] = [
    {"dp": 2, "tp": 1, "pp": 1, "microbatch_size": 4},
    {"dp": 1, "tp": 1, "pp": 2, "microbatch_size": 8},
    {"dp": 1, "tp": 1, "pp": 2, "microbatch_size": 2},
    {"dp": 1, "tp": 2, "pp": 1},
    {"dp": 2, "tp": 3, "pp": 1},
    {"dp": 1, "tp": 2, "pp": 2, "microbatch_size": 8},
]
SGD = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.1)
"""A gradient of zeros is not none: with weight decay and momentum it still moves its parameter."""


def _frozen(*layers: str) -> Net:
    model = Net()
    for layer in layers:
        model.get_submodule(layer).requires_grad_(False)
    return model


def _extra(self: Any) -> None:
    self.d = nn.Linear(12, 12).double()


def _no_grad(self: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = torch.tanh(self.a(x))
        hidden.add_(1.0)
    return F.mse_loss(self.c(torch.tanh(self.b(hidden))) + self.a(x), y)


def _the_same_in_no_grad(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Calls in a region that give back a parameter and a value, which go on with their gradients afterwards."""
    hidden = self.a(x)
    with torch.no_grad():
        scale = hidden.to(x.dtype).contiguous().abs().amax(-1, keepdim=True) + self.b.weight.flatten(1).norm()
        with torch.autocast("cpu", enabled=False):
            scale = scale + self.c.weight.type_as(hidden).contiguous().square().mean()
        view = hidden.view(-1, 12)
    return F.mse_loss(self.c(torch.tanh(self.b(hidden) / scale)) + hidden, y) + view.square().mean()


def _ratio_of_norms(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """A term of parameters alone, which each part of the batch has a share in."""
    return F.mse_loss(self.a(x), y) + self.b.weight.norm() / self.c.weight.norm()


def _laid_down_in_no_grad(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Advantages, from the last step to the first, and what is laid down with a gradient afterwards."""
    value = self.body(x)
    advantage = torch.zeros(x.shape).double()
    column = advantage[:, 3]
    with torch.no_grad():
        for step in reversed(range(6, 12)):
            advantage[:, step] = y[:, step] - value[:, step] + 0.9 * advantage[:, (step + 1) % 12]
        column += value[:, 0]
    advantage[:, 1] = value[:, 1] * 2
    return F.mse_loss(value, advantage)


def _view_from_before_no_grad(self: Any, x: Tensor, y: Tensor) -> Tensor:
    value = self.body(x)
    filled = torch.zeros_like(value)
    column = filled[:, 2]
    with torch.no_grad():
        filled.add_(value)
    return F.mse_loss(value * filled, y) + column.mean()


def _detached_in_place(self: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden = self.a(x)
    hidden.detach_()
    return F.mse_loss(self.c(torch.tanh(self.b(hidden))) + self.a(x), y)


def _tied_but_detached(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(torch.tanh(self.body(x)) @ self.a.weight.detach(), y)


def _detached_middle(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(self.c(torch.tanh(self.b(torch.tanh(self.a(x)).detach()))), y)


def _tied_and_transposed(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(self.b(torch.tanh(self.c(torch.tanh(self.a(x))))) @ self.a.weight, y)


def _used_in_every_stage(self: Any, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(4):
        x = x + torch.tanh(self.a(x))
    return F.mse_loss(self.b(x), y)


def _weight_norm(self: Any, x: Tensor, y: Tensor) -> Tensor:
    weight = F.normalize(self.a.weight, dim=1)
    return F.mse_loss(self.b(x @ weight.t()) + x @ weight, y)


def _through_integers(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(self.a.weight[self.body(x).argmax(1)], y)


def _selected_by_sign(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(torch.where(self.a.weight[0] > 0, self.body(x), x), y)


def _gram(self: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden = self.body(x)
    return F.cross_entropy(hidden @ hidden.t(), torch.arange(x.size(0)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "first layer frozen": lambda: _frozen("a"),
    "middle layer frozen": lambda: _frozen("b"),
    "all but the last frozen": lambda: _frozen("a", "b"),
    "a layer that is not used": lambda: net(Net.forward, _extra),
    "a layer used detached": lambda: net(lambda s, x, y: F.mse_loss(s.body(x) + s.d(x).detach(), y), _extra),
    "first layer in no_grad and outside": lambda: net(_no_grad),
    "the same in no_grad": lambda: net(_the_same_in_no_grad),
    "a ratio of norms": lambda: net(_ratio_of_norms),
    "laid down in no_grad": lambda: net(_laid_down_in_no_grad),
    "a view from before no_grad": lambda: net(_view_from_before_no_grad),
    "detached in place": lambda: net(_detached_in_place),
    "detached in the middle": lambda: net(_detached_middle),
    "tied, detached at the end": lambda: net(_tied_but_detached),
    "tied and transposed": lambda: net(_tied_and_transposed),
    "one layer in every stage": lambda: net(_used_in_every_stage),
    "a normalised weight used twice": lambda: net(_weight_norm),
    "only integers lead back": lambda: net(_through_integers),
    "only a sign leads back": lambda: net(_selected_by_sign),
    "largest of a row": lambda: net(lambda s, x, y: F.mse_loss(s.body(x).max(1).values, y[:, 0])),
    "sorted rows": lambda: net(lambda s, x, y: F.mse_loss(s.body(x).topk(3, 1).values, y[:, :3])),
    "labels made inside": lambda: net(_gram),
}
NEVER_STAGED = {
    "only integers lead back",
    "only a sign leads back",
    "labels made inside",
    "a normalised weight used twice",
}
NEVER_SPLIT = {"largest of a row", "sorted rows", "labels made inside"}


def _allowed(name: str, grid: dict[str, Any]) -> bool:
    """Not every model can be cut in two or have its batch split; others are tested to be refused."""
    splits = grid["dp"] > 1 or grid.get("microbatch_size", 8) < 8
    return not (splits and name in NEVER_SPLIT) and not (grid["pp"] > 1 and name in NEVER_STAGED)


WITHIN: list[dict[str, Any]] = [
    {"dp": 2, "tp": 1, "pp": 1, "microbatch_size": 4},
    {"dp": 1, "tp": 1, "pp": 2, "microbatch_size": 8},
    {"dp": 1, "tp": 2, "pp": 1},
]
"""What other grids hold too, for models whose batch can be split: replicas, two stages, and a tp axis."""
CASES = [
    pytest.param(name, grid, marks=pytest.mark.slow) if grid in WITHIN and name not in NEVER_SPLIT else (name, grid)
    for name in MODELS
    for grid in GRIDS
    if _allowed(name, grid)
]


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("name", "grid"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_trains_as_one_device_does(name: str, grid: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if grid["tp"] > 1:
        draw_prices(monkeypatch, len(name))
    check_parity(MODELS[name](), inputs(), grid["dp"] * grid["tp"] * grid["pp"], 1e-9, optimizer=SGD, **grid)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("seed", range(4))
def test_labels_given_as_integers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter looked up by labels, and labels that are ignored, under random plans."""

    def forward(self: Any, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x) * self.a.weight[t.clamp(min=0)], t)

    draw_prices(monkeypatch, seed)
    check_parity(net(forward), inputs(t=labels()), 4, 1e-9, optimizer=SGD, dp=2, tp=2)
