"""What models share within and across stages, all at once: a layer used many times, tied tables, counters, frozen
parameters, inputs without samples, several losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import check_parity, cpu_cluster
from random_prices import draw_prices
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from unseen_models import BATCH, classes, normal

import autopar
from autopar.planner import search


class Shared(nn.Module):
    """One block five times; its table is the head's; its positions are frozen; weights of places have no batch dim."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(24, 16)
        self.place = nn.Parameter(normal(6, 16) * 0.1, requires_grad=False)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.own = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.double()

    def block(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, ids: Tensor, worth: Tensor) -> dict[str, Any]:
        x = self.block(self.table(ids) + self.place)
        penalty = x.square().mean()
        for own in self.own:
            x = self.block(torch.tanh(own(x)))
        logits = self.head(x)
        losses = F.cross_entropy(logits.transpose(1, 2), ids.roll(-1, 1), reduction="none")
        return {"loss": (losses * worth).mean() + 0.1 * penalty + 0.01 * x.abs().mean(), "parts": (logits, [x])}


def batch() -> dict[str, Tensor]:
    return {"ids": classes(24, BATCH, 6), "worth": torch.linspace(0.5, 1.5, 6, dtype=torch.float64)}


PLANS = {
    "dp2": {"dp": 2, "tp": 1, "pp": 1, "microbatch_size": 2},
    "tp2": {"dp": 1, "tp": 2, "pp": 1},
    "pp2": {"dp": 1, "tp": 1, "pp": 2, "microbatch_size": 2},
    "pp4": {"dp": 1, "tp": 1, "pp": 4, "microbatch_size": 2},
    "tp2-pp2": {"dp": 1, "tp": 2, "pp": 2, "microbatch_size": 4},
    "zero3-pp2": {"dp": 2, "tp": 1, "pp": 2, "zero": 3, "microbatch_size": 4},
}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "plan",
    [pytest.param(p, marks=pytest.mark.slow) if p in ("tp2", "pp2") else p for p in PLANS],  # within others
)
def test_what_is_shared_is_trained_as_on_one_device(plan: str) -> None:
    pins = PLANS[plan]
    check_parity(Shared(), batch(), pins["dp"] * pins["tp"] * pins["pp"], 1e-9, **pins)


class Named(nn.Module):
    """Its parameters and buffers have the names of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(2048, 16)
        self.x, self.y = nn.Parameter(normal(16, 2048) * 0.3), nn.Parameter(normal(16, 4) * 0.3)
        self.register_buffer("worth", torch.zeros(2048))
        self.double()

    def forward(self, x: Tensor, y: Tensor, worth: Tensor) -> Tensor:
        h = torch.tanh(self.a(x) @ self.x)
        self.worth.lerp_(h.detach().mean(0), 0.1)
        losses = F.cross_entropy(torch.relu(self.b(h + self.worth)) @ self.y, y, reduction="none")
        return (losses * (worth / worth.sum())).sum()


@pytest.mark.usefixtures("thread_ranks")
def test_inputs_may_have_the_names_of_parameters_and_buffers() -> None:
    given = {"x": normal(BATCH, 16).double(), "y": classes(4, BATCH), "worth": normal(BATCH).double().abs()}
    check_parity(Named(), given, 2, 1e-9, dp=1, tp=2, pp=1)
    pins = autopar.Parallelism(dp=2, tp=1, pp=2)
    with autopar.compile(Named(), cpu_cluster(4), given, optimizer=None, parallelism=pins) as exe:
        torch.testing.assert_close(exe.forward(given), Named()(**given))


def test_what_several_blocks_share_is_not_searched_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few combinations of placements take long, too, where the search of each is: the blocks are solved apart."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(2) for layer in [nn.Linear(16, 16), nn.Tanh()]))
    model[2].weight = model[0].weight
    given = {"input": normal(BATCH, 16).float()}

    def notes() -> str:
        pins, tp2 = autopar.Parallelism(dp=1, tp=2, pp=1), cpu_cluster(2)
        return str(autopar.estimate(model, tp2, given, loss_fn=lambda y, x: y.square().mean(), parallelism=pins).notes)

    assert "combinations of their placements" not in notes()
    monkeypatch.setattr(search, "MOST_SHARED_ENTRIES", 10)
    assert "combinations of their placements" in notes()


class ReadOften(nn.Module):
    """Two parts of a chain that each read one table more than once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(6, 12))
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 5)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) * self.table + self.table.abs()
        return F.mse_loss(self.last(h + self.table[:, :1] * self.table[:2, 2:3].sum()), y)


@pytest.mark.usefixtures("thread_ranks")
def test_each_part_that_shares_a_table_has_a_second_form_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of one part was taken for all, and no way may lead from it to what another wants."""
    draw_prices(monkeypatch, 3)
    batch = {name: normal(BATCH, 6, 5).double() for name in ("x", "y")}
    plan = check_parity(ReadOften(), batch, 3, 1e-9, dp=1, tp=3, pp=1)
    assert any(name.startswith("form.p_model_table:") for name in plan.stages[0].choices)
    assert autopar.Plan.from_json(plan.to_json()) == plan
