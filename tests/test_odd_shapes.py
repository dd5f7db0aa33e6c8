"""Sizes that do not divide, and models that are no transformers: plans drawn at random train as one device does.

What a rank's share of a size would not be whole is not split: results are right whatever prices say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain_models
import pytest
import torch
import torch.nn.functional as F
from models import example_gpt
from odd_models import Net, inputs, labels, net
from parity import check_parity
from random_prices import draw_prices
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

Model = tuple[nn.Module, dict[str, Tensor]]
BATCH = 6


class Images(nn.Module):
    """Convolutions, pools and norms over images of 15 x 13, all of whose channels are multiples of one number."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(unit, 3 * unit, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(unit, 3 * unit)
        self.deep = nn.Conv2d(3 * unit, 3 * unit, (3, 5), padding=(1, 2), dilation=1, groups=unit)
        self.up = nn.ConvTranspose2d(3 * unit, unit, 3, stride=2)
        self.head = nn.Linear(unit, 5)
        self.double()

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = x + self.deep(F.max_pool2d(x, 3, stride=1, padding=1))
        x = F.avg_pool2d(self.up(F.pad(x, (0, 1, 1, 0))), 2, ceil_mode=True)
        return F.cross_entropy(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)), labels)


def images(unit: int) -> Model:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, unit, 15, 13, generator=generator, dtype=torch.float64)
    return Images(unit), {"image": image, "labels": torch.randint(0, 5, (BATCH,), generator=generator)}


def odd_gpt() -> Model:
    """No size of it is even but the batch and four times the width; inputs are parts of larger tensors."""
    model, batch = example_gpt(torch.float64, n_layer=1, n_head=3, n_embd=33, vocab_size=67, block_size=15)
    return model, {name: tokens[:, :15] for name, tokens in batch.items()}


def _double(made: Model) -> Model:
    model, batch = made
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def _losses(self: Any, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """Three losses, of different values, and a penalty that sees no sample."""
    hidden = torch.tanh(self.a(x))
    penalty = self.b.weight.square().sum() * 1e-2
    return F.mse_loss(self.b(hidden), y) + 0.5 * F.cross_entropy(self.c(hidden), labels) + hidden.abs().mean() + penalty


def _both_ways(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """One weight as it is, transposed, as a table and as a factor."""
    weight = self.a.weight
    hidden = torch.tanh(x @ weight) * weight[0] + F.embedding(torch.arange(4), weight).sum(0)
    return F.mse_loss(self.b(hidden @ weight.t()), y) + F.mse_loss(self.a(self.c(hidden)), y)


def _without_batch(self: Any, x: Tensor, y: Tensor, scale: Tensor, keep: Tensor, ids: Tensor) -> Tensor:
    """Inputs of features alone, of truths, of integers that enter arithmetic."""
    hidden = torch.where(keep, torch.tanh(self.a(x * scale)), 0.0) + ids.unsqueeze(1) / 10
    return F.mse_loss(self.c(torch.relu(self.b(hidden))), y)


def losses() -> Model:
    return net(_losses), inputs(labels=labels())


def both_ways() -> Model:
    return net(_both_ways), inputs()


def without_batch() -> Model:
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(8, 12, generator=generator) > 0.3
    ids = torch.randint(0, 5, (8,), generator=generator)
    return net(_without_batch), inputs(scale=torch.linspace(0.5, 2, 12, dtype=torch.float64), keep=keep, ids=ids)


MODELS: dict[str, Callable[[], Model]] = {
    "odd gpt": odd_gpt,
    "images of 3": lambda: images(3),
    "images of 5": lambda: images(5),
    "scan": lambda: _double(plain_models.mamba()),
    "tables": lambda: _double(plain_models.recommender()),
    "skips": lambda: _double(plain_models.unet()),
    "wide": lambda: _double(plain_models.wide_resnet()),
    "losses": losses,
    "both ways": both_ways,
    "without batch": without_batch,
}
GRIDS: list[dict[str, int]] = [
    {"dp": 1, "tp": 2, "pp": 1},
    {"dp": 1, "tp": 3, "pp": 1},
    {"dp": 2, "tp": 2, "pp": 1},
    {"dp": 1, "tp": 4, "pp": 1},
]
SLOW = ("scan", "skips", "wide")
CASES = [
    pytest.param(name, seed, marks=[pytest.mark.slow] if seed or name in SLOW else [], id=f"{name}-{seed}")
    for name in MODELS
    for seed in range(len(GRIDS))
]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(("name", "seed"), CASES)
def test_random_plans_of_odd_models(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = MODELS[name]()
    pins = GRIDS[(list(MODELS).index(name) + seed) % len(GRIDS)]
    draw_prices(monkeypatch, 1000 + seed)
    check_parity(model, batch, pins["dp"] * pins["tp"] * pins["pp"], 1e-8, **pins)


def test_models_have_the_sizes_they_are_for() -> None:
    assert not any(tokens.is_contiguous() for tokens in odd_gpt()[1].values())
    assert isinstance(losses()[0], Net) and {t.dtype for t in without_batch()[1].values()} > {torch.bool, torch.int64}
