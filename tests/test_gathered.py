"""Gathered: plans at level 3 of ZeRO whose exchanges hide behind compute are searched for beside the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Residual

import autopar
from autopar import gathered
from autopar.planner.solution import Solution

WIDTH = 4096


def estimate(devices: int, cap: str | None = None, **pins: Any) -> autopar.Estimate:
    with torch.device("meta"):
        model, batch = Residual(WIDTH).half(), {"x": torch.empty(64, 512, WIDTH, dtype=torch.float16)}
    cluster = autopar.Cluster.load("dgx-a100-80gb", devices)
    return autopar.estimate(model, cluster, batch, memory_cap=cap, parallelism=autopar.Parallelism(**pins))


@pytest.mark.parametrize("cap", [pytest.param(None, marks=pytest.mark.slow), "6GiB"])
def test_no_pinned_level_is_faster(cap: str | None) -> None:
    found = estimate(16, cap)
    assert found.plan.overlap and found.plan.saving_text().startswith(", zero 3")
    assert any("parameters are split over replicas" in note for note in found.notes)
    assert cap is None or found.peak_bytes <= 6 * 2**30
    for pins in ({"zero": 0}, {"zero": 1}, {"zero": 3}, {"dp": 16, "zero": 3}, {"dp": 8, "tp": 2, "zero": 3}):
        assert found.step_time_s <= estimate(16, cap, **pins).step_time_s * (1 + 1e-9), pins
    still = estimate(16, cap, overlap=False)
    assert not still.plan.overlap and found.step_time_s < 0.97 * still.step_time_s


def test_ctrl_c_leaves_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Solution:
        raise KeyboardInterrupt

    monkeypatch.setattr(gathered, "first", interrupted)
    found = estimate(16)
    assert not found.plan.overlap or not found.plan.saving_text().startswith(", zero 3")
    assert any("interrupted after" in note for note in found.notes)


@pytest.mark.slow
def test_what_may_hide_sums_of_gradients_is_looked_at_beside_gathered_plans() -> None:
    """A gathered plan that takes less than the price of the first plan found ended the search, whatever others hide."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = MixtralForCausalLM(config), torch.zeros(8, 256, dtype=torch.long)
    cluster = autopar.Cluster.load("dgx2-v100-32gb", 8)

    def step_s(**pins: Any) -> float:
        parallelism = autopar.Parallelism(**pins)
        batch = {"input_ids": ids, "labels": ids}
        return autopar.estimate(model, cluster, batch, parallelism=parallelism).step_time_s

    assert step_s() <= min(step_s(dp=dp, tp=8 // dp, pp=1) for dp in (1, 2, 4)) * (1 + 1e-9)
