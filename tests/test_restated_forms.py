"""Calls whose form hides what they do run as on one device: parts put together again, one place, dense gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn import functional as F
from unseen_models import BATCH, classes, normal

from passes.specialise import are_twins
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)
GRIDS = {"dp2": {"dp": 2, "tp": 1, "pp": 1}, "tp2": {"dp": 1, "tp": 2, "pp": 1}}
aten = torch.ops.aten


class Forms(nn.Module):
    """Lists of samples, of positions and of features that become values again, and operands without dims."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 8, sparse=True)
        self.front, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = self.front(self.table(ids)).tanh()
        h = self.one_place(self.rejoined(h))
        one = F.linear(h, self.head.weight[0], self.head.bias[0]).square().mean()
        return F.cross_entropy(self.head(h.mean(1)), labels) + one

    def rejoined(self, h: Tensor) -> Tensor:
        made = torch.stack(h.unbind(0)) + torch.stack([h[:, place] for place in range(h.shape[1])], 1)
        made = made + torch.cat(list(h)).view_as(h) + torch.cat(h.split([3, 5], 2), -1) + torch.cat(h.split(2, 1), 1)
        heads = torch.cat(h.unflatten(2, (2, 4)).unbind(2), 1)
        made = made + heads.unflatten(1, (2, -1)).transpose(1, 2).flatten(2)
        return made + torch.cat((h[:, 1], h[:, 0]), 1).view(len(h), 2, -1).mean(1, keepdim=True)  # not in order

    def one_place(self, h: Tensor) -> Tensor:
        at, number = torch.tensor(2), h.sum().index_select(0, torch.tensor([0])).swapdims(0, 0)
        taken = torch.index_select(h, 2, at)
        h = h.index_fill(2, at, 0.5).index_add(2, at, taken, alpha=2).index_copy(1, at, h[:, :1])
        return h.index_reduce(2, at + 1, taken, "amax") * (1 + number * 1e-3)


def batch() -> dict[str, Tensor]:
    return {"ids": classes(16, BATCH, 6), "labels": classes(4, BATCH)}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("grid", GRIDS)
def test_forms_run_as_on_one_device(grid: str) -> None:
    check_parity(Forms(), batch(), 2, 1e-5, SGD, **GRIDS[grid])


def test_what_is_put_together_again_is_no_list() -> None:
    traced = trace(Forms(), batch())
    assert traced.other is not None
    assert are_twins(traced.global_graph, traced.other)
    joins = [n for n in traced.global_graph.graph.nodes if n.target in (aten.cat.default, aten.stack.default)]
    assert [len(n.all_input_nodes) for n in joins] == [2]


class Aligned(nn.Module):
    """Labels that a mask picks, as many of each sample as it counts; rows of labels, with lengths as numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        likely = self.head(x).log_softmax(-1).transpose(0, 1)
        given, steps = labels >= 0, torch.full((len(x),), x.shape[1])
        picked = F.ctc_loss(likely, labels.masked_select(given), steps, given.sum(-1), reduction="sum")
        rows = F.ctc_loss(likely, labels.abs() + 1, [12] * len(x), [4] * len(x), zero_infinity=True)
        return picked / 50 + rows + F.ctc_loss(likely[:, 0], labels[0, :2].abs() + 1, (12,), (2,))


def spoken() -> dict[str, Tensor]:
    labels = classes(9, BATCH, 4) - 2
    return {"x": normal(BATCH, 12, 6), "labels": labels.masked_fill(labels == 0, 3)}


@pytest.mark.usefixtures("thread_ranks")
def test_alignments_run_as_on_one_device() -> None:
    check_parity(Aligned(), spoken(), 2, 1e-5, SGD, **GRIDS["dp2"])


def test_alignments_in_regions_of_autocast_read_float32() -> None:
    """As torch's own loss does there, which no kernel makes of half types."""

    class Cast(Aligned):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                steps = torch.full((len(x),), x.shape[1])
                return F.ctc_loss(self.head(x).transpose(0, 1) - 2, labels.abs() + 1, steps, (labels > 0).sum(-1))

    graph = trace(Cast(), spoken()).global_graph
    (loss,) = (n for n in graph.graph.nodes if n.target is torch.ops.autopar.ctc.default)
    assert [graph.tensor(node.name).dtype for node in (loss, loss.all_input_nodes[0])] == ["float32"] * 2
