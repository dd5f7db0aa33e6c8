"""Windows that overlap in memory (``as_strided``, as Longformer makes them) run on every plan, wherever values lie."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from unseen_models import BATCH, normal

from cost_model.errors import UnsupportedError
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GRIDS = {"dp2": {"dp": 2, "tp": 1, "pp": 1}, "tp2": {"dp": 1, "tp": 2, "pp": 1}}


def chunks(x: Tensor) -> Tensor:
    """Chunks of 4 that overlap by 2, of a value that lies time first."""
    parts = x.transpose(0, 1).contiguous().transpose(0, 1).view(x.shape[0], 3, 4, x.shape[2])
    far, near = parts.stride()[1] // 2, parts.stride()[2]
    return parts.as_strided((x.shape[0], 5, 4, x.shape[2]), (parts.stride()[0], far, near, 1))


def inner_windows(x: Tensor) -> Tensor:
    """Five windows of 4, two apart, of which the features stand before the places."""
    windows = x.as_strided((x.shape[0], 16, 4, 5), (x.stride()[0], 1, x.shape[2], 2 * x.shape[2]))
    return windows.permute(0, 3, 2, 1)


class Windowed(nn.Module):
    def __init__(self, windows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.head, self.windows = nn.Linear(16, 16), nn.Linear(16, 8), windows

    def forward(self, x: Tensor) -> Tensor:
        h = self.windows(torch.tanh(self.front(x)))
        return self.head((h * torch.arange(1.0, 5.0).view(-1, 1)).tanh()).square().mean()


class Crossed(Windowed):
    """Every other element of memory, of a value whose dims are turned."""

    def forward(self, x: Tensor) -> Tensor:
        turned = self.front(x).transpose(0, 1)
        return self.head(turned.as_strided((BATCH, 16), (16, 1), 0)).square().mean()


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("windows", [chunks, inner_windows])
def test_windows_of_memory_are_windows_of_a_dim(windows: Callable[[Tensor], Tensor], grid: str) -> None:
    check_parity(Windowed(windows), {"x": normal(BATCH, 12, 16)}, 2, 1e-5, SGD, **GRIDS[grid])


class Picked(nn.Module):
    """Views of a parameter's memory: a diagonal, and a block that stands behind another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        block, diagonals = (
            torch.as_strided(self.weight, (16, 16), (1, 16), 256),
            self.weight.as_strided((3, 16), (256, 17)),
        )
        return (x @ block * diagonals.sum(0)).tanh().square().mean()


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_views_of_a_parameters_memory_are_its_elements(grid: str) -> None:
    check_parity(Picked(), {"x": normal(BATCH, 16)}, 2, 1e-5, SGD, **GRIDS[grid])


def test_what_memory_holds_otherwise_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="as_strided reads memory.*unfold"):
        trace(Crossed(chunks), {"x": normal(BATCH, 12, 16)})
