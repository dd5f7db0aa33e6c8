"""What tests share answers by: equal models are one question, and whatever a trace can see makes another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from asked_once import digest, once
from models import example_gpt
from regression import BATCH, Regression
from torch import nn


def _frozen(model: nn.Module) -> None:
    next(model.parameters()).requires_grad_(False)


def _trained(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)


def _tied(model: Any) -> None:
    model.up.weight = model.down.weight


def _hooked(model: nn.Module) -> None:
    model.register_forward_hook(lambda *given: None)


CHANGES: list[Callable[[Any], Any]] = [nn.Module.eval, nn.Module.double, _frozen, _trained, _tied, _hooked]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_model_is_another_question(change: Callable[[Any], Any]) -> None:
    asked = []
    trace = once(lambda model, batch: asked.append(model) or len(asked), most=8)
    model = Regression()
    if change is _tied:
        model.up.weight = nn.Parameter(model.down.weight.detach().clone())  # equal, but two
    found = [trace(model, BATCH), trace(model, dict(BATCH)), trace(model, {**BATCH, "y": torch.ones(8, 8)})]
    change(model)
    assert [*found, trace(model, BATCH)] == [1, 1, 2, 3]


def test_equal_models_are_one_question_under_equal_settings() -> None:
    given = example_gpt()
    first, second, other = digest(given), digest(example_gpt()), digest(example_gpt(n_layer=3))
    torch.set_default_dtype(torch.float64)
    try:
        under = digest(given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first is not None and second is not None and other is not None and under is not None
    assert first[0] == second[0] and len({first[0], other[0], under[0]}) == 3


def test_what_fails_or_is_not_plain_is_asked_again() -> None:
    asked = []

    def fails(model: Any) -> None:
        asked.append(model)
        raise ValueError

    for model in (1, 1, iter([])):
        with pytest.raises(ValueError):
            once(fails, most=1)(model)
    assert len(asked) == 3 and digest(iter([])) is not None and digest(i for i in "ab") is None


def test_the_oldest_answers_are_forgotten() -> None:
    asked: list[int] = []
    answer = once(lambda number: asked.append(number), most=2)
    for number in (1, 2, 1, 3, 2, 1):
        answer(number)
    assert asked == [1, 2, 3, 1]


def test_methods_and_casts_are_part_of_a_question() -> None:
    class Replaced(Regression):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.up(x).sum()

    model = Replaced()
    found = [digest(model)]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found.append(digest(model))
    Replaced.forward = Regression.forward  # type: ignore[method-assign]
    found.append(digest(model))
    assert len({asked[0] for asked in found if asked is not None}) == 4
