"""More models of families that no rule was written for, each with a batch of 8; see ``unseen_models``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unseen_models import BATCH, Build, classes, normal


class Relative(nn.Module):
    """Attention with relative positions by Transformer-XL's shift, its table its head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.out = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.apart = nn.Linear(16, 16)
        self.content, self.place = nn.Parameter(normal(4, 4) * 0.1), nn.Parameter(normal(4, 4) * 0.1)
        self.register_buffer("waves", normal(8, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 4).unbind(2)
        r = self.apart(self.waves[:t]).view(t, 4, 4)
        near = torch.einsum("bihd,bjhd->bhij", q + self.content, k)
        far = F.pad(torch.einsum("bihd,jhd->bhij", q + self.place, r), (1, 0))
        far = far.view(b, 4, t + 1, t)[:, :, 1:].reshape(b, 4, t, t)
        later = torch.triu(torch.ones(t, t, dtype=torch.bool), 1)
        weights = ((near + far) / 2).masked_fill(later, -1e9).softmax(-1)
        x = x + self.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        return F.cross_entropy((x @ self.table.weight.t())[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Points(nn.Module):
    """A point cloud: a learned transform, edges to the nearest points by distance, a maximum over them."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.edge, self.wide, self.head = (
            nn.Linear(3, 9),
            nn.Linear(6, 16),
            nn.Linear(16, 32),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = torch.bmm(x, self.turn(x.mean(1)).view(-1, 3, 3) + torch.eye(3))
        nearest = torch.cdist(x, x).topk(3, largest=False).indices.unsqueeze(-1).expand(-1, -1, -1, 3)
        others = torch.gather(x.unsqueeze(1).expand(-1, x.shape[1], -1, -1), 2, nearest)
        own = x.unsqueeze(2).expand_as(others)
        h = F.leaky_relu(self.edge(torch.cat([own, others - own], -1))).amax(2)
        return F.cross_entropy(self.head(self.wide(h).amax(1)), labels)


class Quantised(nn.Module):
    """The nearest code of each place with a straight-through gradient, a commitment and a codebook loss."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.codes = nn.Conv1d(2, 8, 3, padding=1), nn.Embedding(12, 8)
        self.leave = nn.ConvTranspose1d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z, codes = self.enter(x).transpose(1, 2), self.codes.weight
        apart = z.pow(2).sum(-1, keepdim=True) - 2 * z @ codes.t() + codes.pow(2).sum(-1)
        q = self.codes(apart.argmin(-1))
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return F.mse_loss(self.leave((z + (q - z).detach()).transpose(1, 2)), x) + loss


class Conditioned(nn.Module):
    """Weights of a layer made for each sample by another, and a shift of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.shift, self.head = nn.Linear(5, 48), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, given: Tensor, labels: Tensor) -> Tensor:
        weights = self.weights(given).view(-1, 8, 6).transpose(1, 2)
        h = torch.tanh(torch.baddbmm(self.shift(given).unsqueeze(1), x, weights))
        return F.nll_loss(F.log_softmax(self.head(h.mean(1)), -1), labels)


class Flow(nn.Module):
    """Affine couplings after an invertible matrix given by its triangles; logarithms of determinants add up."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6)) for _ in range(2))
        self.both, self.diagonal = nn.Parameter(normal(6, 6) * 0.1), nn.Parameter(torch.ones(6))
        self.register_buffer("eye", torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        upper = torch.triu(self.both, 1) + torch.diag(self.diagonal)
        x = x @ ((torch.tril(self.both, -1) + self.eye) @ upper).t()
        volume = self.diagonal.abs().log().sum()
        for net in self.nets:
            a, b = x.chunk(2, -1)
            scale, shift = net(a).chunk(2, -1)
            scale = torch.tanh(scale)
            x, volume = torch.cat([b * scale.exp() + shift, a], -1), volume + scale.sum(-1)
        return (0.5 * x.square().sum(-1) - volume).mean()


class Ranked(nn.Module):
    """A factorisation machine over candidates whose ranks are sorted, under a list-wise loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias, self.query = nn.Embedding(40, 8), nn.Embedding(40, 1), nn.Linear(4, 8)

    def forward(self, ids: Tensor, x: Tensor, worth: Tensor) -> Tensor:
        v = self.table(ids)
        pairs = 0.5 * (v.sum(2).square() - v.square().sum(2))
        score = (pairs * self.query(x).unsqueeze(1)).sum(-1) + self.bias(ids).sum((2, 3))
        score = torch.gather(score, 1, worth.argsort(1, descending=True))
        return (torch.logcumsumexp(score.flip(1), 1).flip(1) - score).sum(1).mean()


class Decorrelated(nn.Module):
    """Two views whose features should agree and know nothing of each other, by deviations over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.tower(x), self.tower(y)
        a, b = (a - a.mean(0)) / a.std(0), (b - b.mean(0)) / b.std(0)
        correlation = a.t() @ b / x.shape[0]
        agree = torch.diagonal(correlation)
        return (agree - 1).square().sum() + 0.01 * (correlation.square().sum() - agree.square().sum())


MORE: dict[str, Build] = {
    "relative": lambda: (Relative(), {"ids": classes(32, BATCH, 8)}),
    "points": lambda: (Points(), {"x": normal(BATCH, 7, 3), "labels": classes(4, BATCH)}),
    "quantised": lambda: (Quantised(), {"x": normal(BATCH, 2, 10)}),
    "conditioned": lambda: (
        Conditioned(),
        {"x": normal(BATCH, 4, 6), "given": normal(BATCH, 5), "labels": classes(3, BATCH)},
    ),
    "flow": lambda: (Flow(), {"x": normal(BATCH, 6)}),
    "ranked": lambda: (Ranked(), {"ids": classes(40, BATCH, 5, 3), "x": normal(BATCH, 4), "worth": normal(BATCH, 5)}),
    "decorrelated": lambda: (Decorrelated(), {"x": normal(BATCH, 8), "y": normal(BATCH, 8).flip(0)}),
}
