"""Plain PyTorch models that are no transformers: a scan, recommendation tables, a U-Net, wide residual blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LENGTH, CLASSES = 8, 12, 8


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class SelectiveScan(nn.Module):
    """One Mamba-like block: gated, with a short causal convolution and an input-dependent linear recurrence."""

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 4 * width)
        self.convolution = nn.Conv1d(2 * width, 2 * width, 3, padding=2, groups=2 * width)
        self.step = nn.Linear(2 * width, 2 * width)
        self.drive = nn.Linear(2 * width, 2 * state)
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, state + 1).repeat(2 * width, 1)))
        self.direct = nn.Parameter(torch.ones(2 * width))
        self.leave = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.enter(self.norm(x)).chunk(2, -1)
        mixed = F.silu(self.convolution(inner.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        rate = F.softplus(self.step(mixed))
        write, read = self.drive(mixed).chunk(2, -1)
        keep = torch.exp(-rate.unsqueeze(-1) * self.decay.exp())
        push = (rate * mixed).unsqueeze(-1) * write.unsqueeze(2)
        state = torch.zeros_like(push[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            state = keep[:, t] * state + push[:, t]
            outputs.append((state * read[:, t].unsqueeze(1)).sum(-1))
        scanned = torch.stack(outputs, 1) + self.direct * mixed
        out: Tensor = x + self.leave(scanned * F.silu(gate))
        return out


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(SelectiveScan(16, 4) for _ in range(2))
        self.head = nn.Linear(16, 64)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Recommender(nn.Module):
    """DLRM-like: embedding tables, their pairwise products with the dense features, an MLP on top."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 16) for rows in (64, 32, 128))
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor, clicks: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        features = torch.stack([bottom, *(t(sparse[:, i]) for i, t in enumerate(self.tables))], 1)
        products = torch.bmm(features, features.transpose(1, 2))
        rows, columns = torch.tril_indices(4, 4, offset=-1)
        joined = torch.cat([bottom, products[:, rows, columns]], 1)
        return F.binary_cross_entropy_with_logits(self.top(joined).squeeze(1), clicks)


class Double(nn.Module):
    """Two convolutions with group norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm_1, self.norm_2 = nn.GroupNorm(4, outputs), nn.GroupNorm(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm_2(self.second(F.relu(self.norm_1(self.first(x))))))


class UNet(nn.Module):
    """Down twice, up twice, with skip connections over everything between."""

    def __init__(self) -> None:
        super().__init__()
        self.down_1, self.down_2, self.middle = Double(3, 8), Double(8, 16), Double(16, 32)
        self.up_2, self.up_1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join_2, self.join_1 = Double(32, 16), Double(16, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        first = self.down_1(image)
        second = self.down_2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.join_2(torch.cat([self.up_2(x), second], 1))
        x = self.join_1(torch.cat([self.up_1(x), first], 1))
        return F.mse_loss(self.head(x), target)


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        ready = F.relu(self.norm_1(x))
        out: Tensor = self.short(x) + self.second(F.relu(self.norm_2(self.first(ready))))
        return out


class WideResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(WideBlock(8, 32, 1), WideBlock(32, 32, 1), WideBlock(32, 64, 2))
        self.norm, self.head = nn.BatchNorm2d(64), nn.Linear(64, CLASSES)

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(image))))
        return F.cross_entropy(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)), labels)


def mamba() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (BATCH, LENGTH + 1), generator=_generator())
    return Mamba(), {"ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def recommender() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    generator = _generator()
    return Recommender(), {
        "dense": torch.randn(BATCH, 13, generator=generator),
        "sparse": torch.randint(0, 32, (BATCH, 3), generator=generator),
        "clicks": torch.randint(0, 2, (BATCH,), generator=generator).float(),
    }


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    image, target = torch.randn(2, BATCH, 3, 16, 16, generator=_generator())
    return UNet(), {"image": image, "target": target}


def wide_resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    image = torch.randn(BATCH, 3, 16, 16, generator=_generator())
    return WideResNet(), {"image": image, "labels": torch.randint(0, CLASSES, (BATCH,), generator=_generator())}


PLAIN: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "mamba": mamba,
    "recommender": recommender,
    "unet": unet,
    "wide_resnet": wide_resnet,
}
