"""Models that ask whether they are traced are traced as they run; numbers that follow from sizes are read."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_models import inputs, net
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

from cost_model.errors import TraceError
from passes.graph import ModelGraph
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def called(graph: ModelGraph) -> set[str]:
    return {str(node.target) for node in graph.nodes()}


@pytest.mark.parametrize("asks", [lambda: torch.compiler.is_compiling(), lambda: torch._dynamo.is_compiling()])
def test_the_path_that_runs_is_traced(asks: Any) -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x.sin() if asks() else x.cos()), y)

    traced = trace(net(forward), inputs())
    assert not traced.notes and "aten.cos.default" in called(traced.global_graph)


def test_who_asked_last_before_a_failure_is_told_and_noted() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        h = x.sin() if torch.compiler.is_exporting() else x.cos()
        if torch.compiler.is_exporting() or x.sum() > 0:  # the culprit
            h = h + 1
        return F.mse_loss(self.body(h.exp() if torch.compiler.is_exporting() else h.tanh()), y)

    traced = trace(net(forward), inputs())
    (note,) = traced.notes
    assert "asks whether it is traced" in note and "# the culprit" in note and __file__ in note
    assert {"aten.cos.default", "aten.tanh.default"} < called(traced.global_graph)


def test_who_asked_for_nothing_is_told_nothing() -> None:
    """A check of the batch is answered as ever."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        h = x.sin() if torch.compiler.is_exporting() else x.cos()
        if x.isnan().any():
            raise ValueError
        return F.mse_loss(self.body(h), y)

    traced = trace(net(forward), inputs())
    (note,) = traced.notes
    assert "forward checks" in note and "aten.cos.default" in called(traced.global_graph)


def _kernel(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy())


def test_in_the_end_all_are_told() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        run = torch.sin if torch.compiler.is_exporting() else _kernel
        torch.compiler.is_compiling()
        return F.mse_loss(self.body(run(x)), y)

    traced = trace(net(forward), inputs())
    (note,) = traced.notes
    assert "x.numpy()" in note and "aten.sin.default" in called(traced.global_graph)


class Masked(nn.Module):
    """Attention whose mask, one of ones, is left out where that can be seen; it is causal without one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.head = nn.Linear(12, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        queries, keys, values = self.project(x).split(8, -1)
        mask = torch.zeros(len(x), 6, dtype=torch.bool)
        mask[:, :4] = True
        mask[:, 4:].logical_not_()
        given = None if not torch.compiler.is_exporting() and mask.all() else mask[:, None].expand(-1, 6, -1)
        h = F.scaled_dot_product_attention(queries, keys, values, given, is_causal=given is None)
        return F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


@pytest.mark.usefixtures("thread_ranks")
def test_a_mask_that_only_traces_make_is_not_made() -> None:
    x = torch.randn(8, 6, 12, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "labels": torch.arange(48).view(8, 6) % 4}
    assert not trace(Masked().to("meta"), batch).notes
    check_parity(Masked(), batch, 2, 1e-4, SGD, dp=2, tp=1, pp=1)


def test_numbers_that_follow_from_sizes_are_read() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        places[1::2] += 1
        sizes = places[[2, 1, 7]].tolist()
        parts = self.body(x).split(sizes, 1)
        return sum(F.mse_loss(p, q) / float(places.max()) for p, q in zip(parts, y.split(sizes, 1), strict=True))

    def plain(self: Any, x: Tensor, y: Tensor) -> Tensor:
        parts = self.body(x).split([2, 2, 8], 1)
        return sum(F.mse_loss(p, q) / 12.0 for p, q in zip(parts, y.split([2, 2, 8], 1), strict=True))

    def shaped(graph: ModelGraph) -> list[str]:
        return [str(node.target) for node in graph.nodes() if "split" in node.name or "div" in node.name]

    found, expected = (trace(net(f), inputs()) for f in (forward, plain))
    assert shaped(found.global_graph) == shaped(expected.global_graph) and not found.notes


@pytest.mark.parametrize("made", [torch.rand, lambda n: torch.zeros(n).bernoulli_()], ids=["drawn", "drawn in place"])
def test_what_is_drawn_has_no_value(made: Any) -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x) * (2 if made(4).sum() > 2 else 1), y)

    with pytest.raises(TraceError, match=r"made\(4\)"):
        trace(net(forward).to("meta"), inputs())


def test_what_is_written_of_the_batch_has_no_value() -> None:
    """Nor is its answer that of one run."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        seen = torch.zeros(4, dtype=x.dtype)
        seen[1:].copy_(x[0, :3])
        return F.mse_loss(self.body(x) * (2 if seen[0] + seen.sum() > 0 else 1), y)

    with pytest.raises(TraceError, match=r"seen\[0\]"):
        trace(net(forward), inputs())
