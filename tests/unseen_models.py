"""Models of families that no rule was written for, each with a batch of 8; one class a family, its loss its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 8
Build = Callable[[], tuple[nn.Module, dict[str, Tensor]]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def classes(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


class Mixer(nn.Module):
    """MLP-Mixer: products along tokens and along channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.tokens = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.channels = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        for index, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            h = h + tokens(self.norms[2 * index](h).transpose(1, 2)).transpose(1, 2)
            h = h + channels(self.norms[2 * index + 1](h))
        return F.cross_entropy(self.head(h.mean(1)), labels)


class Graph(nn.Module):
    """A graph network over a dense adjacency, with attention over neighbours and a boolean mask of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.message = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.score = nn.ModuleList(nn.Linear(32, 1) for _ in range(2))
        self.leave = nn.Linear(16, 1)

    def forward(self, nodes: Tensor, adjacency: Tensor, present: Tensor, target: Tensor) -> Tensor:
        h = self.enter(nodes)
        for message, score in zip(self.message, self.score, strict=True):
            n = h.shape[1]
            pairs = torch.cat([h.unsqueeze(2).expand(-1, n, n, -1), h.unsqueeze(1).expand(-1, n, n, -1)], -1)
            logits = score(pairs).squeeze(-1).masked_fill(~adjacency, -1e9)
            h = h + torch.relu(logits.softmax(-1) @ message(h))
        pooled = (h * present.unsqueeze(-1)).sum(1) / present.sum(1, keepdim=True)
        return F.mse_loss(self.leave(pooled).squeeze(-1), target)


class Temporal(nn.Module):
    """A TCN: dilated causal convolutions with weight norm by hand, and gates."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(8 if i else 4, 16, 3, dilation=2**i) for i in range(3))
        self.head = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for index, conv in enumerate(self.convs):
            h = F.glu(conv(F.pad(h, (2 * 2**index, 0))), 1)
        return (self.head(h)[:, :, :-1] - x[:, :, 1:]).abs().mean()


class Rwkv(nn.Module):
    """Time mixing with a decaying state, step by step, and squared-relu channel mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mix = nn.Parameter(torch.full((16,), 0.5))
        self.decay = nn.Parameter(torch.linspace(-2, 0, 16))
        self.first = nn.Parameter(torch.zeros(16))
        self.key, self.value, self.gate, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        before = F.pad(x, (0, 0, 1, -1))
        mixed = x * self.mix + before * (1 - self.mix)
        k, v, r = self.key(mixed), self.value(mixed), torch.sigmoid(self.gate(mixed))
        total, weight, outs = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
        for t in range(ids.shape[1]):
            now = torch.exp(k[:, t] + self.first)
            outs.append((total + now * v[:, t]) / (weight + now))
            kept = torch.exp(-torch.exp(self.decay))
            total = total * kept + torch.exp(k[:, t]) * v[:, t]
            weight = weight * kept + torch.exp(k[:, t])
        x = x + self.out(r * torch.stack(outs, 1))
        x = x + self.down(torch.relu(self.up(self.norm(x))).square())
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Capsules(nn.Module):
    """Routing by agreement between capsules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 5, 2)
        self.route = nn.Parameter(normal(72, 4, 6, 8) * 0.1)

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        return square / (1 + square) * x / (square + 1e-6).sqrt()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.squash(F.relu(self.conv(x)).reshape(x.shape[0], -1, 8))
        votes = torch.einsum("bid,icod->bico", h, self.route)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(2):
            out = self.squash((logits.softmax(2).unsqueeze(-1) * votes).sum(1))
            logits = logits + (votes * out.unsqueeze(1)).sum(-1)
        length = (out.square().sum(-1) + 1e-6).sqrt()
        wanted = F.one_hot(labels, 4).to(length.dtype)
        loss = wanted * F.relu(0.9 - length).square() + 0.5 * (1 - wanted) * F.relu(length - 0.1).square()
        return loss.sum(1).mean()


class Autoencoder(nn.Module):
    """A VAE whose noise is an input, with overlapping pools and overlapping transposed convolutions; two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 3, 2, 1)
        self.mean, self.spread = nn.Linear(8 * 16, 8), nn.Linear(8 * 16, 8)
        self.grow = nn.Linear(8, 8 * 16)
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ConvTranspose2d(8, 1, 3, 2, 1, 1)])

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        h = F.max_pool2d(F.silu(self.down(x)), 3, 2, 1).flatten(1)
        mean, spread = self.mean(h), self.spread(h)
        z = mean + noise * torch.exp(0.5 * spread)
        h = self.grow(z).unflatten(1, (8, 4, 4))
        out = self.up[1](F.silu(self.up[0](h)))
        kl = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1).mean()
        return F.binary_cross_entropy_with_logits(out, x.sigmoid()) + 0.01 * kl


class Siamese(nn.Module):
    """One tower used twice, a triplet and a classification loss, a frozen embedding and an output that is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(40, 16, mode="mean")
        self.words.weight.requires_grad_(False)
        self.tower = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
        self.classify = nn.Linear(16, 3)

    def forward(self, left: Tensor, right: Tensor, other: Tensor, labels: Tensor) -> dict[str, Tensor]:
        a, b, c = (F.normalize(self.tower(self.words(x)), dim=-1) for x in (left, right, other))
        near = F.triplet_margin_loss(a, b, c)
        logits = self.classify(torch.cat([a, (a - b).abs()], -1))
        return {"loss": near + 0.5 * F.cross_entropy(logits, labels), "logits": logits}


class Windows(nn.Module):
    """Attention in shifted windows with a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(normal(49, 4) * 0.1)
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None, :]) + 3
        self.register_buffer("index", apart[0] * 7 + apart[1])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 8)

    def attend(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(x).view(-1, 16, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].permute(2, 0, 1)
        x = ((q * 0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        x = self.out(x.transpose(1, 2).reshape(-1, 16, c))
        return x.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.patch(x).permute(0, 2, 3, 1)
        h = h + self.attend(self.norm(h))
        h = h + self.attend(h.roll((-2, -2), (1, 2))).roll((2, 2), (1, 2))
        return F.cross_entropy(self.head(h.mean((1, 2))), labels)


class Efficient(nn.Module):
    """Inverted bottlenecks with depthwise convolutions, squeeze and excitation, and overlapping average pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.expand, self.depth = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.squeeze, self.excite, self.project = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = F.hardswish(self.norm(self.stem(x)))
        inner = F.silu(self.depth(F.silu(self.expand(h))))
        inner = inner * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(inner, 1)))))
        h = F.avg_pool2d(h + self.project(inner), 3, 2, 1)
        return F.cross_entropy(self.head(h.mean((2, 3))), labels, label_smoothing=0.1)


class Conformer(nn.Module):
    """Half-step feed-forwards around attention (nn.MultiheadAttention) and a gated depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)) for _ in "ab"
        )
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.point, self.depth, self.out = (
            nn.Conv1d(16, 32, 1),
            nn.Conv1d(16, 16, 5, padding=2, groups=16),
            nn.Conv1d(16, 16, 1),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor, padding: Tensor, labels: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        h = F.silu(self.depth(F.glu(self.point(self.norms[1](x).transpose(1, 2)), 1)))
        x = x + self.out(h).transpose(1, 2)
        x = self.norms[2](x + 0.5 * self.last(x))
        return F.cross_entropy(self.head(x).transpose(1, 2), labels, ignore_index=0)


class Recurrent(nn.Module):
    """An LSTM and a GRU, cell by cell, under a count of steps that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.long, self.gated = nn.LSTMCell(8, 16), nn.GRUCell(16, 16)
        self.head = nn.Linear(16, 32)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, ids: Tensor) -> Tensor:
        self.seen += 1
        x = self.embed(ids)
        h, c = (x.new_zeros(x.shape[0], 16) for _ in "hc")
        g, outs = x.new_zeros(x.shape[0], 16), []
        for t in range(ids.shape[1] - 1):
            h, c = self.long(x[:, t], (h, c))
            g = self.gated(h, g)
            outs.append(self.head(g))
        return F.cross_entropy(torch.stack(outs, 1).flatten(0, 1), ids[:, 1:].flatten())


class StateSpace(nn.Module):
    """A diagonal linear recurrence as a product with its kernel, and a gated product of two lifted features."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.out = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 4)
        self.decay, self.weight = nn.Parameter(torch.rand(16, 6)), nn.Parameter(normal(16, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        steps = torch.arange(length, device=x.device)
        powers = torch.exp(-self.decay.unsqueeze(-1) * steps)
        kernel = (self.weight.unsqueeze(-1) * powers).sum(1)
        apart = steps.unsqueeze(1) - steps
        matrix = torch.where(apart >= 0, kernel[:, apart.clamp(min=0)], 0.0)
        h = torch.einsum("cts,bsc->btc", matrix, self.enter(x)) * torch.sigmoid(self.gate(x))
        return F.smooth_l1_loss(self.out(h)[:, :-1], x[:, 1:])


class Crossing(nn.Module):
    """Deep and cross: tables of several widths, feature crosses, and a wide linear part; boolean and dense inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 8) for size in (50, 30, 20))
        self.cross = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.PReLU(), nn.Linear(64, 16))
        self.dense, self.flag, self.head = nn.Linear(5, 8), nn.Parameter(torch.ones(())), nn.Linear(48, 1)

    def forward(self, ids: Tensor, dense: Tensor, member: Tensor, clicked: Tensor) -> Tensor:
        first = torch.cat([*(t(ids[:, i]) for i, t in enumerate(self.tables)), self.dense(dense)], 1)
        x = first
        for layer in self.cross:
            x = first * layer(x) + x
        logit = self.head(torch.cat([x, self.deep(first)], 1)).squeeze(1) + torch.where(member, self.flag, 0.0)
        return F.binary_cross_entropy_with_logits(logit, clicked)


class Perceiver(nn.Module):
    """Latents that attend to the input: queries without a batch dim, and Fourier features of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(normal(6, 16) * 0.5)
        self.enter = nn.Linear(11, 16)
        self.q, self.k, self.v, self.head = (nn.Linear(16, n) for n in (16, 16, 16, 8))
        self.register_buffer("scales", 2.0 ** torch.arange(4))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, x.shape[1], device=x.device).unsqueeze(1) * self.scales
        seen = torch.cat([place.sin(), place.cos()], -1).expand(x.shape[0], -1, -1)
        x = self.enter(torch.cat([x, seen], -1))
        h = self.latents.expand(x.shape[0], -1, -1)
        for _ in range(2):
            q, k, v = (p(y).unflatten(-1, (2, 8)).transpose(1, 2) for p, y in ((self.q, h), (self.k, x), (self.v, x)))
            h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(h.amax(1)), labels)


class Spectral(nn.Module):
    """A Fourier neural operator: products in the frequency domain, written with real sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.lower = nn.Linear(1, 8), nn.Linear(8, 1)
        self.weight = nn.Parameter(normal(2, 4, 8, 8) * 0.2)
        self.skip = nn.Conv1d(8, 8, 1)
        angle = 2 * torch.pi * torch.arange(16).unsqueeze(1) * torch.arange(4) / 16
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.lift(x.unsqueeze(-1))
        real, imaginary = (torch.einsum("btc,tk->bkc", h, b) for b in (self.cosine, -self.sine))
        a, b = self.weight
        outs = (torch.einsum("bki,kio->bko", p, w) for p, w in ((real, a), (imaginary, b), (real, b), (imaginary, a)))
        rr, ii, ri, ir = outs
        back = torch.einsum("bkc,tk->btc", rr - ii, self.cosine) - torch.einsum("bkc,tk->btc", ri + ir, self.sine)
        h = F.gelu(back / 16 + self.skip(h.transpose(1, 2)).transpose(1, 2))
        return F.mse_loss(self.lower(h).squeeze(-1), y)


UNSEEN: dict[str, Build] = {
    "mixer": lambda: (Mixer(), {"x": normal(BATCH, 3, 16, 16), "labels": classes(8, BATCH)}),
    "graph": lambda: (
        Graph(),
        {
            "nodes": normal(BATCH, 6, 6),
            "adjacency": (classes(2, BATCH, 6, 6) + torch.eye(6).long()).bool(),
            "present": torch.arange(6).expand(BATCH, 6) < 1 + classes(6, BATCH, 1),
            "target": normal(BATCH),
        },
    ),
    "temporal": lambda: (Temporal(), {"x": normal(BATCH, 4, 12)}),
    "rwkv": lambda: (Rwkv(), {"ids": classes(32, BATCH, 6)}),
    "capsules": lambda: (Capsules(), {"x": normal(BATCH, 1, 16, 16), "labels": classes(4, BATCH)}),
    "autoencoder": lambda: (Autoencoder(), {"x": normal(BATCH, 1, 16, 16), "noise": normal(BATCH, 8)}),
    "siamese": lambda: (
        Siamese(),
        {
            "left": classes(40, BATCH, 5),
            "right": classes(39, BATCH, 5) + 1,
            "other": classes(37, BATCH, 5) + 3,
            "labels": classes(3, BATCH),
        },
    ),
    "windows": lambda: (Windows(), {"x": normal(BATCH, 3, 16, 16), "labels": classes(8, BATCH)}),
    "efficient": lambda: (Efficient(), {"x": normal(BATCH, 3, 16, 16), "labels": classes(8, BATCH)}),
    "conformer": lambda: (
        Conformer(),
        {
            "x": normal(BATCH, 10, 16),
            "padding": torch.arange(10).expand(BATCH, 10) > 3 + classes(6, BATCH, 1),
            "labels": classes(8, BATCH, 10),
        },
    ),
    "recurrent": lambda: (Recurrent(), {"ids": classes(32, BATCH, 5)}),
    "state_space": lambda: (StateSpace(), {"x": normal(BATCH, 12, 4)}),
    "crossing": lambda: (
        Crossing(),
        {
            "ids": classes(20, BATCH, 3),
            "dense": normal(BATCH, 5),
            "member": classes(2, BATCH).bool(),
            "clicked": classes(2, BATCH).float(),
        },
    ),
    "perceiver": lambda: (Perceiver(), {"x": normal(BATCH, 12, 3), "labels": classes(8, BATCH)}),
    "spectral": lambda: (Spectral(), {"x": normal(BATCH, 16), "y": normal(BATCH, 16).roll(1, 1)}),
}
