"""The mother of all tests: what runs sharded equals what runs on one device, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import example_gpt, hf_gpt2
from parity import ADAMW, check_parity
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("shared_ranks")

GRIDS = [
    {"dp": 2, "tp": 1, "pp": 1},
    {"dp": 1, "tp": 2, "pp": 1},
    {"dp": 1, "tp": 1, "pp": 2},
    {"dp": 2, "tp": 2, "pp": 1},
    {"dp": 1, "tp": 2, "pp": 2},
    {"dp": 2, "tp": 1, "pp": 2},
    {"dp": 2, "tp": 2, "pp": 2},
]


def _name(pins: dict[str, object]) -> str:
    return "-".join(f"{k}{v}" for k, v in pins.items())


def _devices(pins: dict[str, int]) -> int:
    return pins["dp"] * pins["tp"] * pins["pp"]


def _grids(*quick: str) -> list[Any]:
    """All, those that are not named marked slow."""
    return [pins if _name(pins) in quick else pytest.param(pins, marks=pytest.mark.slow) for pins in GRIDS]


@pytest.mark.parametrize("pins", _grids("dp2-tp1-pp1", "dp1-tp2-pp2"), ids=_name)
def test_example_gpt_in_double_precision(pins: dict[str, int]) -> None:
    model, batch = example_gpt(torch.float64)
    plan = check_parity(model, batch, _devices(pins), 1e-9, **pins)
    assert (plan.dp, plan.tp, plan.pp) == (pins["dp"], pins["tp"], pins["pp"])


@pytest.mark.usefixtures("thread_ranks")
def test_three_axes_on_threads() -> None:
    model, batch = example_gpt(torch.float64)
    check_parity(model, batch, 8, 1e-9, dp=2, tp=2, pp=2)


@pytest.mark.parametrize("pins", _grids("dp1-tp2-pp1"), ids=_name)
def test_hf_gpt2_in_single_precision(pins: dict[str, int]) -> None:
    model, batch = hf_gpt2("sdpa" if pins["pp"] == 1 else "eager")
    check_parity(model, batch, _devices(pins), 1e-5, **pins)


@pytest.mark.parametrize("schedule", [pytest.param("gpipe", marks=pytest.mark.slow), "1f1b"])
def test_microbatches_under_both_schedules(schedule: str) -> None:
    model, batch = example_gpt(torch.float64, attention="explicit", tied=False, fused_qkv=False)
    check_parity(model, batch, 2, 1e-9, pp=2, schedule=schedule, microbatch_size=2)


def test_tied_weights_across_stages_with_adamw() -> None:
    model, batch = example_gpt(torch.float64, tied=True)
    check_parity(model, batch, 4, 1e-8, optimizer=ADAMW, dp=2, pp=2, microbatch_size=1)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_planners_own_choice(devices: int) -> None:
    model, batch = example_gpt(torch.float64)
    check_parity(model, batch, devices, 1e-9)


def test_uneven_heads_and_vocabulary_are_not_split_wrongly() -> None:
    model, batch = example_gpt(torch.float64, n_head=3, n_embd=33, vocab_size=67)
    check_parity(model, batch, 2, 1e-9, tp=2)
