"""Random plans, not good ones: whatever the planner can emit trains as one device does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import example_gpt, hf_gpt2
from parity import check_parity
from random_prices import draw_prices
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

Model = Callable[[], tuple[Any, dict[str, torch.Tensor]]]
MODELS: dict[str, tuple[Model, float]] = {
    "fused": (lambda: example_gpt(torch.float64), 1e-9),
    "explicit": (lambda: example_gpt(torch.float64, attention="explicit", fused_qkv=False, tied=False), 1e-9),
    "thirds": (lambda: example_gpt(torch.float64, tied=False, n_head=3, n_embd=48, vocab_size=66), 1e-9),
    "gpt2-eager": (lambda: hf_gpt2("eager"), 1e-5),
    "gpt2-sdpa": (lambda: hf_gpt2("sdpa"), 1e-5),
}
GRIDS: list[dict[str, int]] = [
    {"dp": 1, "tp": 2, "pp": 1},
    {"dp": 1, "tp": 4, "pp": 1, "microbatch_size": 4},
    {"dp": 1, "tp": 3, "pp": 1},
    {"dp": 2, "tp": 2, "pp": 1},
    {"dp": 1, "tp": 2, "pp": 2, "microbatch_size": 2},
    {"dp": 2, "tp": 1, "pp": 2, "microbatch_size": 2},
    {"dp": 1, "tp": 2, "pp": 3, "microbatch_size": 4},
]
REAL_GRIDS = [grid for grid in GRIDS if grid["dp"] * grid["tp"] * grid["pp"] == 4]


def _check(seed: int, grids: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One model on one grid under one draw of prices; every model meets every grid within 5 x len(grids) seeds."""
    build, tolerance = list(MODELS.values())[seed % len(MODELS)]
    pins = grids[(seed // len(MODELS) + seed) % len(grids)]
    model, batch = build()
    draw_prices(monkeypatch, seed)
    check_parity(model, batch, pins["dp"] * pins["tp"] * pins["pp"], tolerance, **pins)


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_on_real_ranks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(seed, REAL_GRIDS, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("seed", range(4, 72))
def test_more_on_real_ranks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(seed, GRIDS, monkeypatch)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "seed", [*range(100, 104), *(pytest.param(n, marks=pytest.mark.slow) for n in range(104, 108))]
)
def test_on_threads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(seed, GRIDS, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("seed", range(108, 121))
def test_more_on_threads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(seed, GRIDS, monkeypatch)


def test_draws_differ_and_repeat() -> None:
    """Two seeds give two plans, one seed gives one."""
    from parity import cpu_cluster

    import autopar

    plans = []
    for seed in (1, 2, 1):
        with pytest.MonkeyPatch.context() as patch:
            draw_prices(patch, seed)
            model, batch = example_gpt(torch.float64)
            pins = autopar.Parallelism(tp=2)
            plans.append(autopar.compile(model, cpu_cluster(2), batch, parallelism=pins).plan.to_json())
    assert plans[0] == plans[2] and plans[0] != plans[1]
