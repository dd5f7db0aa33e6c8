"""Sparse matrices of constants, and those made of places and values, multiply as on one device."""

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
NODES = 6
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 1]])
"""One place twice, where values add up."""


def neighbours() -> Tensor:
    return torch.eye(NODES) * 0.5 + torch.eye(NODES).roll(1, 0)


class Graph(nn.Module):
    """Sparse buffers, in products from both sides, turned, scaled and dense; a matrix of learned values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.head, self.weights = nn.Linear(8, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(7))
        self.register_buffer("near", neighbours().to_sparse())
        self.register_buffer("rows", neighbours().to_sparse(), persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.front(x).transpose(0, 1).flatten(1)
        h = torch.sparse.mm(self.near, h) + torch.sparse.addmm(h, self.rows.t(), h) + (h.t() @ (self.near * 2)).t()
        learned = torch.sparse_coo_tensor(EDGES, self.weights.tanh(), (NODES, NODES))
        h = h + learned.coalesce() @ h + learned.transpose(0, 1).to_dense() @ h
        h = h * torch.mv((-self.near).double(), self.weights[:NODES].double()).float().unsqueeze(1)
        return F.cross_entropy(self.head(h.view(NODES, -1, 8).mean(0)), labels)


def batch() -> dict[str, Tensor]:
    return {"x": normal(BATCH, NODES, 8), "labels": classes(4, BATCH)}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("pins", [{"dp": 2, "tp": 1, "pp": 1}, {"dp": 1, "tp": 2, "pp": 1}], ids=["dp2", "tp2"])
def test_sparse_products_run_as_on_one_device(pins: dict[str, int]) -> None:
    check_parity(Graph(), batch(), 2, 1e-5, SGD, **pins)


def test_a_matrix_in_csr_form_is_its_places_and_values() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(NODES, 4)
            self.register_buffer("near", neighbours().to_sparse_csr())

        def forward(self, x: Tensor) -> Tensor:
            return self.front((self.near @ x.t()).t()).sum()

    constants = trace(Rows(), {"x": normal(BATCH, NODES)}).constants
    made = torch.sparse_coo_tensor(constants["near.indices"], constants["near.values"], (NODES, NODES))
    assert torch.equal(made.to_dense(), neighbours())


def test_other_sparse_tensors_are_refused_with_what_to_write() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(NODES, NODES)
            self.register_buffer("near", torch.stack([neighbours().to_sparse()] * 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.near, self.front(x).expand(2, -1, -1).transpose(1, 2)).sum()

    with pytest.raises(UnsupportedError, match=r"'near' is a sparse tensor.*make it dense"):
        trace(Stacked(), {"x": normal(BATCH, NODES)})
