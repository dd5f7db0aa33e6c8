"""Numbers that forward can reach and change are noted, wherever they lie: a program has those of its trace."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from passes.trace import trace

_STATE = {"steps": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self._steps, self.schedule, self.options = 1, {"warm": [1.0, 2]}, SimpleNamespace(inner=SimpleNamespace(k=1))
        self.counter, self.rates, self.items = itertools.count(1), self._rates(), iter([1, 2, 3, 4, 5, 6, 7, 8])
        self.kept: list[Tensor] = []

    def _rates(self) -> Iterator[int]:
        yield from range(100)

    def scale(self) -> float | Tensor:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.scale()).square().mean()


class Private(Net):
    def scale(self) -> float:
        self._steps += 1
        return self._steps


class Nested(Net):
    def scale(self) -> float:
        self.schedule["warm"][1] += 1
        return self.schedule["warm"][1]


class Object(Net):
    def scale(self) -> float:
        self.options.inner.k += 1
        return float(self.options.inner.k)


class Global(Net):
    def forward(self, x: Tensor) -> Tensor:
        _STATE["steps"] += 1
        return super().forward(x) * _STATE["steps"]


class Counted(Net):
    def scale(self) -> float:
        return next(self.counter)


class Generated(Net):
    def scale(self) -> float:
        return next(self.rates)


class Iterated(Net):
    def scale(self) -> float:
        return next(self.items)


class Kept(Net):
    def scale(self) -> Tensor:
        self.kept.append(self.layer.weight.detach().mean())
        return torch.stack(self.kept).sum()


def _closed() -> type[Net]:
    state = {"steps": 1}

    class Closed(Net):
        def forward(self, x: Tensor) -> Tensor:
            state["steps"] += 1
            return super().forward(x) * state["steps"]

    return Closed


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (Private, "changes '_steps'"),
        (Nested, r"changes 'schedule\.warm\.1'"),
        (Object, r"changes 'options\.inner\.k'"),
        (Global, r"changes 'Global\.forward\._STATE\.steps'"),
        (_closed(), r"changes 'Closed\.forward\.state\.steps'"),
        (Counted, "changes 'counter'"),
        (Generated, "changes 'rates'"),
        (Iterated, "changes 'items'"),
        (Kept, "keeps a tensor in 'kept'"),
    ],
)
def test_what_forward_changes_is_noted(build: Callable[[], Net], place: str) -> None:
    notes = "\n".join(trace(build(), {"x": torch.ones(4, 4)}).notes)
    assert re.search(f"forward {place}", notes)


def test_what_forward_leaves_as_it_is_has_no_note() -> None:
    assert trace(Net(), {"x": torch.ones(4, 4)}).notes == ()
