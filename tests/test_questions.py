"""Checks of tensors' values, and branches that no batch changes, are answered; others are refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn import functional as F
from unseen_models import BATCH, classes, normal

from cost_model.errors import TraceError, UnsupportedError
from passes.trace import trace

SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Asking(nn.Module):
    """Checks its labels, and branches on what no batch changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.register_buffer("scale", torch.full((16,), 2.0))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if labels.max() >= 4:
            raise ValueError("too large")
        h = self.norm(self.front(x))
        if (self.scale > 1).all():
            h = h / self.scale
        assert (labels >= 0).all().item()
        return F.cross_entropy(self.head(h), labels)


def batch() -> dict[str, Tensor]:
    return {"x": normal(BATCH, 8), "labels": classes(4, BATCH)}


@pytest.mark.usefixtures("thread_ranks")
def test_answers_are_those_of_the_batch() -> None:
    check_parity(Asking(), batch(), 2, 1e-4, SGD, dp=2, tp=1, pp=1)


def test_lines_and_answers_are_noted_and_buffers_stay() -> None:
    model = Asking()
    notes = [note for note in trace(model, batch()).notes if "forward checks" in note]
    assert len(notes) == 3 and "labels.max() >= 4" in notes[0] and "to be False" in notes[0]
    assert "to be True" in notes[1] and int(model.norm.num_batches_tracked) == 0


def test_without_weights_nothing_can_be_asked() -> None:
    with pytest.raises(TraceError, match=r"labels.max\(\) >= 4"):
        trace(Asking().to("meta"), batch())


def test_a_branch_that_batches_change_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            h = self.a(x)
            return F.cross_entropy(h * 2 if h.sum() > 0 else h, labels)

    with pytest.raises(TraceError, match=r"h.sum\(\) > 0"):
        trace(Branching(), batch())


class Watched(nn.Module):
    """Asks for a value of its own, and does one thing where it is true."""

    def __init__(self, answered: Any) -> None:
        super().__init__()
        self.a, self.answered = nn.Linear(8, 4), answered
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.a(x)
        if h.isnan().any():
            h = self.answered(self, h)
        return F.cross_entropy(h, labels)


def _warned(model: Watched, h: Tensor) -> Tensor:
    print(h.mean(), model.seen)
    return h


def test_a_branch_that_only_warns_is_left_out() -> None:
    (note,) = trace(Watched(_warned), batch()).notes
    assert "h.isnan().any()" in note and "to be False" in note


def _counted(model: Watched, h: Tensor) -> Tensor:
    model.seen.add_(1)
    return h


def _frozen(model: Watched, h: Tensor) -> Tensor:
    with torch.no_grad():
        return model.a(torch.ones(BATCH, 8))


@pytest.mark.parametrize(
    "answered",
    [_counted, _frozen, lambda _, h: h.detach(), lambda _, h: h.nan_to_num(), lambda _, h: h[:].zero_()],
    ids=["a buffer", "other values", "no gradient", "a repair", "a write"],
)
def test_a_branch_that_changes_anything_is_refused(answered: Any) -> None:
    with pytest.raises(TraceError, match=r"h.isnan\(\).any\(\)"):
        trace(Watched(answered), batch())


@pytest.mark.parametrize("replaced", [True, False])
def test_a_branch_that_steps_change_is_refused(replaced: bool) -> None:
    class Ranged(nn.Module):
        """The first step sets the range, others move it."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)
            self.register_buffer("top", torch.zeros(1))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            h = self.a(x)
            top = self.top + h.detach().max() if self.top.max() == 0 else 0.9 * self.top + 0.1 * h.detach().max()
            if replaced:
                self.top = top
            else:
                self.top.copy_(top)
            return F.cross_entropy(h, labels)

    model = Ranged()
    given = model.top
    with pytest.raises(TraceError, match=r"self\.top\.max\(\) == 0"):
        trace(model, batch())
    assert model.top is given and float(model.top) == 0


def test_what_is_asked_only_outside_of_traces_is_no_question() -> None:
    class Warning(Asking):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and 3 in labels[:, None]:
                print("a label is 3")
            return super().forward(x, labels)

    notes = [note for note in trace(Warning(), batch()).notes if "forward checks" in note]
    assert len(notes) == 3 and not any("3 in labels" in note for note in notes)


def test_a_number_read_from_a_tensor_is_refused() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return F.cross_entropy(self.a(x) * labels.max().item(), labels)

    with pytest.raises(UnsupportedError, match="a number that aten.item"):
        trace(Reading(), batch())
