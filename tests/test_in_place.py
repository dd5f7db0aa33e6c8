"""Calls that write in place: they become calls that return what they wrote, where nothing else reads that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.in_place import state_writes, writes


class Net(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.linear = change, nn.Linear(4, 4)
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x), x).pow(2).mean()


def added(h: Tensor, x: Tensor) -> Tensor:
    h += x
    return torch.relu_(h).mul_(2.0)


def of_a_view(h: Tensor, x: Tensor) -> Tensor:
    wide = (h @ h.mT).view(16)
    wide += 1.0
    return wide.view(4, 4).masked_fill_(x > 0, 0.5)


def read_later(h: Tensor, x: Tensor) -> Tensor:
    """Under its old name, which is the call's for the tracer."""
    before = h
    made = h.add_(x)
    return before * made


def alias_read_later(h: Tensor, x: Tensor) -> Tensor:
    rows = h.t()
    h.add_(x)
    return rows * 2


def part(h: Tensor, x: Tensor) -> Tensor:
    h = h * 1.0
    h[:, 1] += x[:, 0]
    return h


def part_read_before(h: Tensor, x: Tensor) -> Tensor:
    h = h * 1.0
    column = h[:, 1]
    h[:, 1] += x[:, 0]
    return h + column[:, None]


def two_parts(h: Tensor, x: Tensor) -> Tensor:
    made = h * 0.0
    made[0] = x[0]
    made[:, 1] = x[:, 1]
    return made


def part_written_twice(h: Tensor, x: Tensor) -> Tensor:
    """By one view, of which the whole has to know both times."""
    made = h * 1.0
    made[:, :2].mul_(3.0).add_(x[:, :2])
    return made


def parts_of_a_part(h: Tensor, x: Tensor) -> Tensor:
    made = h * 1.0
    some = made[:, 1:]
    some[:, 0].mul_(3.0)
    some[:, 1].add_(x[:, 0])
    return made


def part_read_after_the_whole_changed(h: Tensor, x: Tensor) -> Tensor:
    made = h * 1.0
    some = made[:, 1:]
    some.mul_(3.0)
    made.add_(x)
    return made[:, 1:] * some


def unused_before_a_region(h: Tensor, x: Tensor) -> Tensor:
    made = (h * 1.0).add_(x)
    made.mean().mul(2.0)
    with torch.no_grad():
        shift = made.mean()
    return made.add_(shift)


def view_between_parts(h: Tensor, x: Tensor) -> Tensor:
    made = h * 1.0
    made[0] = x[0]
    row = made[1]
    made[1] = x[1] * 2
    return made + row


def view_of_all_between_parts(h: Tensor, x: Tensor) -> Tensor:
    made = h * 1.0
    made[0] = x[0]
    flat = made.view(16)
    made[1, 2:] = x[1, 2:]
    return made + flat.view(4, 4)


def compared(h: Tensor, x: Tensor) -> Tensor:
    return h + (x * 1.0).gt_(0.0)


def input_written(h: Tensor, x: Tensor) -> Tensor:
    kept = x * 1.0
    kept.view(16).add_(1.0)
    return h + kept


def of_another_type(h: Tensor, x: Tensor) -> Tensor:
    made = h.half()
    made += x
    return made.float()


def strided(h: Tensor, x: Tensor) -> Tensor:
    made = (h * 2.0).t()
    made += x
    return made


def drawn(h: Tensor, x: Tensor) -> Tensor:
    made = h * 0.0
    made.uniform_()
    return h + made.detach() * 0.0


def one_of_two_results(h: Tensor, x: Tensor) -> Tensor:
    """As routers of mixtures of experts scale the weights of those that were chosen."""
    weights, chosen = h.softmax(-1).topk(2)
    weights /= weights.sum(-1, keepdim=True)
    return x.gather(1, chosen) * weights


def one_of_two_results_read_later(h: Tensor, x: Tensor) -> Tensor:
    weights, chosen = h.softmax(-1).topk(2)
    rows = weights[0]
    weights /= weights.sum(-1, keepdim=True)
    return x.gather(1, chosen) * weights + rows


CASES: list[tuple[Any, bool | None]] = [
    (added, True),
    (of_a_view, True),
    (read_later, True),
    (alias_read_later, False),
    (part, True),
    (part_read_before, False),
    (two_parts, True),
    (part_written_twice, None),
    (parts_of_a_part, None),
    (part_read_after_the_whole_changed, None),
    (unused_before_a_region, True),
    (view_between_parts, None),
    (view_of_all_between_parts, None),
    (compared, False),
    (input_written, False),
    (of_another_type, False),
    (strided, True),
    (drawn, False),
    (one_of_two_results, True),
    (one_of_two_results_read_later, False),
]


@pytest.mark.parametrize(("change", "stated"), CASES)
def test_what_nothing_else_reads_is_stated_and_all_give_the_same(change: Any, stated: bool) -> None:
    torch.manual_seed(0)
    net, x = Net(change), torch.randn(4, 4)
    exported = torch.export.export(net, (x,), strict=False)
    graph = exported.graph_module.graph
    assert any(map(writes, graph.nodes))
    expected = net(x)
    state_writes(graph)
    assert stated in (None, not any(map(writes, graph.nodes)))
    found = torch.fx.Interpreter(exported.graph_module).run(*net.parameters(), net.offset, x)
    torch.testing.assert_close(found[0], expected)
