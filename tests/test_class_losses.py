"""Cross entropies of each element, with weights of classes and smoothed, on replicas and shards as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import check_parity
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn
from unseen_models import BATCH, classes, normal

FORMS: dict[str, dict[str, Any]] = {
    "each": {"reduction": "none"},
    "each smoothed": {"reduction": "none", "label_smoothing": 0.2},
    "each weighted and smoothed": {"reduction": "none", "weighted": True, "label_smoothing": 0.1},
    "weighted": {"weighted": True},
    "weighted and smoothed": {"weighted": True, "label_smoothing": 0.3},
    "sum, weighted": {"reduction": "sum", "weighted": True},
}


class Classified(nn.Module):
    """Classes along dim 1; where the loss is one of each element, it is weighed by an input."""

    def __init__(self, weighted: bool = False, **form: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.head, self.form = nn.Linear(6, 16), nn.Linear(16, 10), form
        self.register_buffer("weight", torch.linspace(0.5, 2.0, 10) if weighted else None)
        self.double()

    def forward(self, x: Tensor, labels: Tensor, worth: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.enter(x))).transpose(1, 2)
        loss = F.cross_entropy(logits, labels, weight=self.weight, **self.form)
        return (loss * worth).mean() if loss.ndim else loss


def batch() -> dict[str, Tensor]:
    labels = classes(10, BATCH, 5)
    labels[0, 2:] = -100
    labels[3, 0] = -100
    return {"x": normal(BATCH, 5, 6).double(), "labels": labels, "worth": normal(BATCH, 5).double().abs()}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("pins", [{"dp": 2, "tp": 1}, {"dp": 1, "tp": 2}], ids=["dp2", "tp2"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_of_classes(form: str, pins: dict[str, int]) -> None:
    check_parity(Classified(**FORMS[form]), batch(), 2, 1e-9, pp=1, **pins)


class Adaptive(nn.Module):
    """Classes in clusters of their own, of all rows and of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 16)
        self.loss = nn.AdaptiveLogSoftmaxWithLoss(16, 10, [3, 6], div_value=2.0, head_bias=True).double()
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        likely, loss = self.loss(h.flatten(0, 1), labels.flatten())
        _, of_one = self.loss(self.enter.weight[:, 0], torch.tensor(7))
        return loss - 0.1 * likely.square().mean() + 0.1 * of_one


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("pins", [{"dp": 2, "tp": 1}, {"dp": 1, "tp": 2}], ids=["dp2", "tp2"])
def test_classes_in_clusters(pins: dict[str, int]) -> None:
    given = {"x": batch()["x"], "labels": classes(10, BATCH, 5)}
    check_parity(Adaptive(), given, 2, 1e-9, pp=1, **pins)
