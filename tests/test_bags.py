"""Embedding bags of any size run as on one device, wherever their ids lie."""

from __future__ import annotations

import functools

import pytest
import torch
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn import functional as F
from unseen_models import BATCH, classes, normal

from cost_model.errors import UnsupportedError
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GRIDS = {"dp2": {"dp": 2, "tp": 1, "pp": 1}, "tp2": {"dp": 1, "tp": 2, "pp": 1}}
IDS, STARTS = 30, [0, 4, 4, 9, 13, 20, 22, 30]


class Bags(nn.Module):
    """Sums by weights, means and maxima of ids one after the other, of which two bags are empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.summed = nn.EmbeddingBag(50, 8, mode="sum")
        self.means = nn.EmbeddingBag(50, 8, padding_idx=3, include_last_offset=True)
        self.largest = nn.EmbeddingBag(50, 8, mode="max", padding_idx=7)
        self.head = nn.Linear(29, 4)

    def forward(self, x: Tensor, labels: Tensor, ids: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        ends = torch.cat([starts, torch.tensor([IDS])])
        bags = self.summed(ids, starts, weights), self.means(ids, ends), self.largest(ids, starts)
        return F.cross_entropy(self.head(torch.cat([x, *bags], 1)), labels)


def batch() -> dict[str, Tensor]:
    given = {"x": normal(BATCH, 5), "labels": classes(4, BATCH)}
    return {**given, "ids": classes(50, IDS) % 10, "starts": torch.tensor(STARTS), "weights": normal(IDS)}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_bags_of_any_size(grid: str) -> None:
    check_parity(Bags(), batch(), 2, 1e-5, SGD, **GRIDS[grid])


@pytest.mark.usefixtures("thread_ranks")
def test_ids_may_be_what_is_split() -> None:
    given = batch()
    first = {"ids": given.pop("ids"), "weights": given.pop("weights"), **given}
    check_parity(Bags(), first, 2, 1e-5, SGD, **GRIDS["dp2"])


def test_gradients_by_how_often_an_id_comes_are_refused() -> None:
    model = Bags()
    model.means.scale_grad_by_freq = True
    with pytest.raises(UnsupportedError, match="scale_grad_by_freq=False"):
        trace(model, batch())
