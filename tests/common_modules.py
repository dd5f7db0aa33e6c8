"""Modules of torch.nn and ways of writing models that people use every day, each with a batch of 8; also losses that
compare all samples of a batch with each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from unseen_models import BATCH, Build, classes, normal


class Attention(nn.Module):
    """nn.MultiheadAttention both ways round, its weights returned, and with rows of its own for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y, weights = self.first(x, x, x)
        turned = y.transpose(0, 1)
        z = self.last(turned, turned, turned, need_weights=False)[0].transpose(0, 1)
        return F.cross_entropy(self.head((y + z).mean(1)), labels) + weights.square().mean()


class Transformer(nn.Module):
    """nn.Transformer, whose decoder looks whether its mask is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return F.cross_entropy(self.head(self.body(x, x.flip(1), tgt_mask=mask).mean(1)), labels)


class BothWays(nn.Module):
    """A bidirectional LSTM and, over its result, a GRU along dim 0."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
        self.gated, self.head = nn.GRU(16, 8, bidirectional=True), nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out, (_, cells) = self.long(x[:, :4])
        out, _ = self.gated(out.transpose(0, 1))
        return F.cross_entropy(self.head(out[-1]), labels) + cells.square().mean()


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


class Parametrized(nn.Module):
    """Weight norm, an orthogonal matrix, a parametrization of the user's own; parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(16, 16))
        self.turn = parametrizations.orthogonal(nn.Linear(16, 16), orthogonal_map="cayley")
        self.even = nn.Linear(16, 16)
        parametrize.register_parametrization(self.even, "weight", Symmetric())
        self.list = nn.ParameterList([nn.Parameter(normal(16, 16) * 0.2) for _ in range(2)])
        self.dict = nn.ParameterDict({"weight": nn.Parameter(normal(8, 16)), "bias": nn.Parameter(torch.zeros(8))})

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = torch.relu(self.even(torch.tanh(self.turn(torch.relu(self.first(x))))))
        for weight in self.list:
            h = torch.tanh(h @ weight)
        return F.cross_entropy(F.linear(h.mean(1), self.dict["weight"], self.dict["bias"]), labels)


class Complex(nn.Module):
    """Complex parameters between Fourier transforms, and rotations as products of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_complex(normal(16, 16, 4, 2) * 0.2))
        self.head = nn.Linear(16, 8)
        self.register_buffer("turns", torch.polar(torch.ones(10, 8), normal(10, 8)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        low = torch.einsum("btc,cdt->btd", torch.fft.rfft(x, dim=1)[:, :4], self.weight)
        h = torch.fft.irfft(low, n=10, dim=1)
        turned = torch.view_as_complex(h.unflatten(-1, (8, 2)).contiguous()) * self.turns
        return F.cross_entropy(self.head(torch.view_as_real(turned).flatten(-2).relu().mean(1)), labels)


class Mapped(nn.Module):
    """torch.vmap over an ensemble of weights and over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.each = nn.Parameter(normal(4, 16, 16) * 0.2), nn.Linear(16, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        members = torch.vmap(lambda weight: torch.tanh(x @ weight))(self.weights)
        h = torch.vmap(lambda sample: torch.relu(self.each(sample)).mean(0))(members.mean(0))
        return F.cross_entropy(self.head(h), labels)


class Circular(nn.Module):
    """Convolutions that go round: torch writes parts of the image, and parts of those, into an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(16, 16), nn.Linear(16, 8)
        self.row = nn.Conv1d(10, 12, 3, padding=1, padding_mode="circular")
        self.image = nn.Conv2d(12, 6, 3, padding=(1, 2), padding_mode="circular")

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        rows = self.row(self.lift(x))
        return F.cross_entropy(self.head(self.image(rows.unflatten(2, (4, 4))).flatten(2)[..., :16].mean(1)), labels)


class Contrastive(nn.Module):
    """InfoNCE between two views."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        a, b = (F.normalize(tower(view), dim=-1) for tower, view in ((self.left, x[:, 0]), (self.right, x[:, 1])))
        logits, own = 5 * a @ b.t(), torch.arange(x.shape[0])
        return F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)


class Decorrelated(nn.Module):
    """Barlow twins and VICReg: features normed over the batch, and their correlations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        a, b = ((z - z.mean(0)) / z.std(0) for z in (self.body(x[:, 0]), self.body(x[:, 1])))
        return (a.t() @ b / x.shape[0] - torch.eye(8)).square().sum()


class RootMean(nn.Module):
    """The root of a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(self.body(x.mean(1)).squeeze(-1), labels.float()).sqrt()


class Balanced(nn.Module):
    """A mixture of experts whose load over the batch enters the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(16, 4), nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        chosen = F.one_hot(chances.argmax(-1), 4).float()
        made = sum(expert(x) * (chosen * chances)[..., i : i + 1] for i, expert in enumerate(self.experts))
        load = (chosen.mean((0, 1)) * chances.mean((0, 1))).sum()
        return F.cross_entropy(self.head(made.mean(1)), labels) + 0.04 * load


class Placed(nn.Module):
    """masked_scatter: which row goes where depends on all samples before."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.image = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        mask = (x[..., :1] > 0.5).expand_as(x)
        return self.words(x).masked_scatter(mask, self.image(x.flip(1))).square().mean()


def _built(kind: type[nn.Module]) -> Build:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        return kind(), {"x": normal(BATCH, 10, 16), "labels": classes(8, BATCH)}

    return build


def _named(*kinds: type[nn.Module]) -> dict[str, Build]:
    return {kind.__name__.lower(): _built(kind) for kind in kinds}


COMMON = _named(Attention, Transformer, BothWays, Parametrized, Complex, Mapped, Circular)
COUPLED = _named(Contrastive, Placed, Decorrelated, RootMean, Balanced)
"""Whose samples depend on each other, or whose losses are not linear in sums over them: replicas exchange either."""
