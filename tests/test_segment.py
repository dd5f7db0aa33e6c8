"""Segments: the chain, its cuts, equal blocks folded, labels for people."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import example_gpt, hf_gpt2
from odd_models import inputs, net
from torch import Tensor, nn

from passes.dependence import active_nodes
from passes.segment import Segment, segment
from passes.trace import trace


def segments_of(model: nn.Module, batch: Any, least: int = 1) -> tuple[Segment, ...]:
    graph = trace(model, batch).global_graph
    found = segment(graph, least=least)
    _check_chain(found, active_nodes(graph))
    return found


def _check_chain(found: tuple[Segment, ...], active: frozenset[str]) -> None:
    """Every parameter-dependent call is in exactly one segment; what leaves one enters the next."""
    nodes = [name for part in found for name in part.nodes]
    assert len(nodes) == len(set(nodes)) and set(nodes) == active
    assert found[0].entry is None
    for before, after in zip(found, found[1:], strict=False):
        assert after.entry == before.exit == before.nodes[-1]


@pytest.mark.parametrize("changes", [{}, {"attention": "explicit"}, {"fused_qkv": False}, {"tied": False}], ids=str)
def test_blocks_of_the_example_are_folded(changes: dict[str, Any]) -> None:
    found = segments_of(*example_gpt(n_layer=3, **changes))
    labels = [part.label for part in found]
    blocks = [f"blocks.{i}" for i in range(3)]
    assert labels == ["token", "position", *blocks, "norm", "head" if changes == {"tied": False} else "token"]
    assert len({part.kind for part in found[2:5]}) == 1 and len({part.kind for part in found}) == 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2(attention: str) -> None:
    found = segments_of(*hf_gpt2(attention, layers=4))
    blocks = [part for part in found if ".h." in part.label]
    assert [part.label for part in blocks] == [f"transformer.h.{i}" for i in range(4)]
    assert len({part.kind for part in blocks}) == 1
    assert all(len(part.parameters) == 12 for part in blocks)


def test_a_shared_layer_is_one_kind_with_the_same_parameters() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        x = self.c(x)
        for _ in range(4):
            x = x + torch.tanh(self.a(x))
        return F.mse_loss(self.b(x), y)

    found = segments_of(net(forward), inputs())
    shared = [part for part in found if part.label == "a"]
    assert len(shared) == 4 and len({part.kind for part in shared}) == 1
    assert {part.parameters for part in shared} == {("p_model_a_weight", "p_model_a_bias")}


def test_equal_layers_with_and_without_sharing_differ() -> None:
    """A layer used twice is priced with both uses in mind."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x))
        return F.mse_loss(torch.tanh(self.a(x)), y)

    first, second, third = (part.kind for part in segments_of(net(forward), inputs()))
    assert len({first, second, third}) == 3


def test_the_first_of_equal_layers_differs_because_nothing_enters_it() -> None:
    found = segments_of(net(lambda self, x, y: F.mse_loss(self.body(x), y)), inputs())
    assert [part.label for part in found] == ["a", "b", "c"]
    assert found[0].entry is None and found[0].kind != found[1].kind


def test_a_frozen_layer_is_another_kind() -> None:
    model = net(lambda self, x, y: F.mse_loss(self.body(torch.tanh(self.a(x))), y))
    model.b.requires_grad_(False)
    found = {part.label: part.kind for part in segments_of(model, inputs())}
    assert found["b"] != found["c"]


def _cuts(forward: Any) -> list[str | None]:
    return [part.entry for part in segments_of(net(forward), inputs())]


def test_no_cut_at_a_tuple() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        left, right = self.b(torch.cat([right, left], 1)).chunk(2, 1)
        return F.mse_loss(self.c(torch.cat([right, left], 1)), y)

    assert _cuts(forward) == [None, "cat", "cat_1"]


def test_no_cut_at_integers() -> None:
    assert _cuts(lambda self, x, y: F.mse_loss(self.a.weight[self.body(x).argmax(1)], y)) == [None]


def test_no_cut_before_a_detach() -> None:
    """What crosses a cut gets a gradient back."""

    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.c(torch.tanh(self.b(torch.tanh(self.a(x)).detach()))), y)

    assert _cuts(forward) == [None, "tanh_1"]


def test_no_cut_at_what_knows_no_batch() -> None:
    assert _cuts(lambda self, x, y: F.mse_loss(x * self.a.weight[0], y)) == [None]


def test_no_cut_while_two_values_are_live() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        skipped = self.a(x)
        return F.mse_loss(self.c(torch.tanh(self.b(skipped))) + skipped, y)

    assert _cuts(forward) == [None, "linear"]


def _two_streams(self: Any, x: Tensor, y: Tensor) -> Tensor:
    left, right = self.a(x), self.b(x)
    for _ in range(2):
        left = left + torch.tanh(self.c(right))
        right = right + torch.tanh(self.a(left))
    return F.mse_loss(left * right, y)


@pytest.mark.parametrize(("least", "entries"), [(2, [None, "linear"]), (3, [None, "linear", "add"])])
def test_a_chain_that_is_too_short_is_cut_where_several_values_are_live(least: int, entries: list[str | None]) -> None:
    """All of them are carried, where they have the fewest bytes and parts are as long as they can be."""
    found = segments_of(net(_two_streams), inputs(), least)
    assert [part.entry for part in found] == entries
    assert [part.carried for part in found[2:]] == [("linear_1",)] * (least - 2)


class _Routed(nn.Module):
    """Blocks of 4 parameters that read one routing and add to one sum of losses."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(12, 8), nn.Parameter(torch.ones(8, 8))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(blocks))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, extra = self.first(x), x.new_zeros(())
        route = x.argmax(-1)
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * self.scale[route]
            extra = extra + x.square().mean()
        return F.mse_loss(x, y[:, :8]) + 0.1 * extra


def test_integers_and_growing_sums_are_carried() -> None:
    """Neither whole numbers that many blocks read nor a sum that each adds to leaves most of a model in one segment."""
    found = segments_of(_Routed(10), inputs())
    labels = [part.label for part in found]
    assert labels[0] == "first" and len(found) >= 10 and len({part.kind for part in found}) <= 4
    assert all("argmax" in part.carried for part in found[2:])


def test_blocks_are_taken_apart_before_anything_is_carried() -> None:
    model, batch = example_gpt(n_layer=3)
    found = segments_of(model, batch, len(segments_of(model, batch)) + 1)
    assert [part.label for part in found][2:4] == ["blocks.0", "blocks.0"] and not any(part.carried for part in found)
