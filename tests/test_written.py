"""Buffers that forward gives new values end as on one device, whatever the new values are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_models import inputs, net, queue_with_place
from parity import check_parity, cpu_cluster
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from cost_model.errors import ParallelismError, UnsupportedError
from passes.trace import trace


def _power(self: Any) -> None:
    self.b = nn.utils.parametrizations.spectral_norm(self.b)


def _normed_twice(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """A discriminator's: the power iteration goes on with every call."""
    return F.mse_loss(self.body(x), y) - 0.1 * self.body(y).mean()


def _average(self: Any) -> None:
    self.register_buffer("mean", torch.zeros(12, dtype=torch.float64))


def _centred(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """By a mean over all batches so far, which the batch at hand joins."""
    made = self.body(x)
    with torch.no_grad():
        self.mean.lerp_(made.mean(0), 0.1)
    return F.mse_loss(made - self.mean, y)


def _left_behind(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """The mean is read before it changes, and changes last."""
    loss = F.mse_loss(self.body(x) - self.mean, y)
    with torch.no_grad():
        self.mean.mul_(0.9).add_(0.1 * self.a(x).sum(0))
    return loss


def _codes(self: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    self.register_buffer("codes", torch.randn(5, 12, generator=generator, dtype=torch.float64))
    self.register_buffer("counts", torch.ones(5, dtype=torch.float64))


def _nearest_code(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Codes follow the samples nearest to them, as in a VQ-VAE without a codebook loss."""
    made = self.a(x)
    near = F.one_hot(torch.cdist(made, self.codes).argmin(1), 5).to(x.dtype)
    taken = near @ self.codes
    self.counts.mul_(0.9)
    self.counts += 0.1 * near.sum(0)
    self.codes.mul_(0.9).add_(0.1 * (near.t() @ made.detach()) / self.counts[:, None])
    return F.mse_loss(self.c(made + (taken - made).detach()), y) + 0.25 * F.mse_loss(made, taken.detach())


def _queue(self: Any) -> None:
    self.register_buffer("queue", torch.randn(16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def _queued(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """MoCo's: keys of this batch are compared with in the next ones."""
    query, key = F.normalize(self.body(x), dim=1), F.normalize(self.b(y).detach(), dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().t()], 1)
    self.queue.copy_(torch.cat([key, self.queue[: -len(key)]]))
    return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


def _assigned(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Buffers that get other tensors, one of them the tensor of another, and a count."""
    made = self.body(x)
    self.last, self.mean = self.mean, 0.9 * self.mean + 0.1 * made.detach().mean(0)
    self.steps = self.steps + 1
    return F.mse_loss(made - self.mean - self.last, y)


def _counting(self: Any) -> None:
    self.register_buffer("steps", torch.zeros((), dtype=torch.long))
    self.register_buffer("heat", torch.ones((), dtype=torch.float64))


def _annealed(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """Weights that follow how many steps there were, before and after this one."""
    weight = torch.exp(-self.heat)
    self.steps += 1
    self.heat += 0.5
    return F.mse_loss(self.body(x), y) + weight * torch.clamp(self.steps / 4, max=1) * self.b(x).square().mean()


def _assignable(self: Any) -> None:
    _average(self)
    self.register_buffer("last", torch.ones(12, dtype=torch.float64))
    self.register_buffer("steps", torch.zeros((), dtype=torch.long))


def _viewed(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """A view from before ``no_grad`` has what is written there, without its gradient."""
    half = self.mean[:6]
    with torch.no_grad():
        self.mean.mul_(0.5).add_(self.a.bias)
    return F.mse_loss(self.body(x - self.mean), y) + half.square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "power iteration": lambda: net(lambda self, x, y: F.mse_loss(self.body(x), y), _power),
    "power iterations": lambda: net(_normed_twice, _power),
    "moving average": lambda: net(_centred, _average),
    "moving average of inputs": lambda: net(
        lambda self, x, y: F.mse_loss(self.a(x - self.mean.lerp_(x.mean(0), 0.1)), y), _average
    ),
    "viewed": lambda: net(_viewed, _average),
    "changed last": lambda: net(_left_behind, _average),
    "moving codes": lambda: net(_nearest_code, _codes),
    "assigned": lambda: net(_assigned, _assignable),
    "annealed": lambda: net(_annealed, _counting),
    "queue": lambda: net(_queued, _queue),
    "place in a queue": queue_with_place,
}
DP, TP, PP = {"dp": 2, "tp": 1, "pp": 1}, {"dp": 1, "tp": 2, "pp": 1}, {"dp": 1, "tp": 1, "pp": 2}


def test_a_complex_buffer_is_refused() -> None:
    def build(self: Any) -> None:
        self.register_buffer("phase", torch.ones((), dtype=torch.complex128))

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        self.phase.mul_(1j)
        return F.mse_loss(self.body(x), y)

    with pytest.raises(UnsupportedError, match="'phase', a buffer of torch.complex128"):
        trace(net(forward, build), inputs())


def test_a_buffer_that_is_read_and_given_another_shape_is_refused() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        made = self.body(x) + self.mean.mean()
        self.mean = torch.cat([self.mean, made.detach().mean(0)])
        return F.mse_loss(made, y)

    with pytest.raises(UnsupportedError, match="forward reads 'mean' .* keeps its shape"):
        trace(net(forward, _average), inputs())


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("name", "pins"),
    [
        *((name, pins) for name in MODELS if name != "viewed" for pins in (DP, TP)),
        ("viewed", DP),
        ("power iteration", PP),
        ("power iteration", {**DP, "zero": 3}),
        ("annealed", PP),
        ("moving codes", {**DP, "tp": 2}),
    ],
    ids=str,
)
def test_written_buffers_are_those_of_one_device(name: str, pins: dict[str, int]) -> None:
    check_parity(MODELS[name](), inputs(), pins["dp"] * pins["tp"] * pins["pp"], 1e-9, **pins)


def test_a_written_buffer_is_said_and_allows_one_microbatch() -> None:
    model = MODELS["power iteration"]()
    estimate = autopar.estimate(model, cpu_cluster(2), inputs(), parallelism=autopar.Parallelism(**DP))
    assert any("gives 2 buffer(s) or parameter(s) a new value" in note for note in estimate.notes)
    with pytest.raises(ParallelismError, match="one microbatch"):
        autopar.estimate(model, cpu_cluster(2), inputs(), parallelism=autopar.Parallelism(dp=2, microbatch_size=2))


def test_a_buffer_that_keeps_its_shape_at_one_batch_size_is_kept_with_the_whole_batch() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        key = self.body(x)
        self.queue = torch.cat([key.detach(), self.queue[:-8]])
        return (key @ self.queue.t()).square().mean()

    def build(self: Any) -> None:
        self.register_buffer("queue", torch.ones(16, 12, dtype=torch.float64))

    traced = trace(net(forward, build), inputs())
    assert traced.other is None and "puts another tensor there" in str(traced.alone)
