"""Small models that each have one thing a rewriter can get wrong; double precision, a batch of 8."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, WIDTH = 8, 12


def inputs(**more: Tensor) -> dict[str, Tensor]:
    """x and y [8, 12], and what else is given."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    return {"x": x, "y": y, **more}


def labels() -> Tensor:
    """Classes [8], two of them ignored, both in the first half."""
    found = torch.randint(0, WIDTH, (BATCH,), generator=torch.Generator().manual_seed(1))
    return found.index_fill(0, torch.tensor([1, 2]), -100)


def mask() -> Tensor:
    """Weights [8, 12] of 0 and 1, uneven over samples."""
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(BATCH, WIDTH, generator=generator) > torch.linspace(0.1, 0.8, BATCH)[:, None]).double()


class Net(nn.Module):
    """Three layers a, b, c of width 12; subclasses change ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH).double() for _ in range(3))
        self.build()

    def build(self) -> None:
        """More parts."""

    def body(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)


def net(forward: Any, build: Any = None) -> Net:
    """A ``Net`` with this forward(self, x, y, ...)."""
    kind = type("OddNet", (Net,), {"forward": forward, **({"build": build} if build else {})})
    made = kind()
    assert isinstance(made, Net)
    return made


def queue_with_place() -> Net:
    """A queue of keys that is written to in turn; whole numbers say where, how often kinds were met and what was."""

    def build(self: Any) -> None:
        queue = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.register_buffer("queue", queue)
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(WIDTH, dtype=torch.bool))

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return F.mse_loss(self.body(x) * self.seen, y) + self.counts[0] + self.queue[self.place].sum()
        key, near = self.b(y).detach(), self.a(x) @ self.queue.clone().t()
        loss = F.mse_loss(self.body(x) * (1 + self.counts[:1]), y) + near.square().mean()
        self.queue[(self.place + torch.arange(len(key))) % 16] = key
        self.place.copy_((self.place + len(key)) % 16)
        self.counts.add_(F.one_hot((x[:, 0] > 0) + 1, 3).sum(0))
        self.seen.logical_or_((x > 1.8).any(0))
        return loss

    return net(forward, build)
