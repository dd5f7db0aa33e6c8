"""Tensor parallelism over several axes: what each op does on each of them adds up to what one device does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from models import example_gpt
from parity import SGD, check_parity, cpu_cluster, largest_error, reference
from random_prices import draw_prices
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

import autopar
from autopar.planner.prices import MeshPrices
from autopar.planner.several_axes import pairs, spans_levels
from cost_model.axes import NO_LINK, Axes
from cost_model.collectives import Link
from cost_model.errors import ConfigError, ParallelismError
from cost_model.ops import OpCall
from cost_model.placement import Placements, parse_placements, placements_text
from cost_model.strategies import MeshStrategy

Model = Callable[[], tuple[Any, dict[str, torch.Tensor]]]
GRIDS: list[dict[str, Any]] = [
    {"dp": 1, "tp_axes": (2, 2), "pp": 1},
    {"dp": 2, "tp_axes": (2, 2), "pp": 1},
    {"dp": 1, "tp_axes": (2, 2), "pp": 2, "microbatch_size": 4},
]


def _devices(pins: dict[str, Any]) -> int:
    first, second = pins["tp_axes"]
    devices: int = pins["dp"] * first * second * pins["pp"]
    return devices


def check_random_plan(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = GRIDS[seed % len(GRIDS)]
    model, batch = example_gpt(torch.float64, tied=seed % 2 == 0)
    draw_prices(monkeypatch, seed)
    check_parity(model, batch, _devices(pins), 1e-9, **{"microbatch_size": 4, **pins})


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_plans(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under drawn prices strategies of all kinds meet on the two axes."""
    check_random_plan(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("seed", range(2, 32))
def test_more_random_plans(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_random_plan(seed, monkeypatch)


# --- What each axis does, required op by op

Wanted = dict[str, Callable[[OpCall, MeshStrategy], bool]]
"""Op -> which of its strategies are allowed."""


def require(patch: pytest.MonkeyPatch, wanted: Wanted) -> None:
    """No plan does otherwise."""
    priced_s = MeshPrices.op_time_s

    def op_time_s(prices: MeshPrices, call: OpCall, strategy: MeshStrategy) -> float:
        allowed = call.op not in wanted or wanted[call.op](call, strategy)
        return priced_s(prices, call, strategy) if allowed else math.inf

    patch.setattr(MeshPrices, "op_time_s", op_time_s)


def lies(index: int, *texts: str) -> Callable[[OpCall, MeshStrategy], bool]:
    """Operand ``index`` lies in one of these placements."""
    known: list[Placements] = [parse_placements(text) for text in texts]
    return lambda call, strategy: strategy.inputs[index] in known


VOCABULARY: Wanted = {
    "aten.embedding.default": lambda call, s: call.inputs[0].shape[0] < 40 or lies(0, "S(0) | S(0,2)")(call, s),
    "autopar.cross_entropy_sum.default": lambda call, s: all(own.inside for own in s.axes),
}
SEQUENCE_BESIDE_FEATURES: Wanted = {
    "aten.layer_norm.default": lies(0, "S(1) | R", "S(1) | V"),
    "aten.linear.default": lambda call, s: placements_text(s.outputs[0]) in ("S(1) | S(2)", "S(1) | P"),
    "autopar.attention.default": lies(0, "S(2) | S(1)", "S(1) | S(1,2)"),
}
EXPERTS_BESIDE_FEATURES: Wanted = {"autopar.experts.default": lies(4, "S(0) | S(2)")}
CASES: dict[str, tuple[Callable[[], tuple[Any, dict[str, torch.Tensor]]], Wanted, float]] = {
    "vocabulary over both": (lambda: example_gpt(torch.float64, vocab_size=64), VOCABULARY, 1e-9),
    "sequence beside features": (lambda: example_gpt(torch.float64, tied=False), SEQUENCE_BESIDE_FEATURES, 1e-9),
    "experts beside features": (FAMILIES["mixtral"], EXPERTS_BESIDE_FEATURES, 1e-5),
}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c == "experts beside features" else c for c in CASES]
)
def test_what_each_axis_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, wanted, tolerance = CASES[case]
    require(monkeypatch, wanted)
    check_parity(*build(), 4, tolerance, dp=1, tp_axes=(2, 2), pp=1, microbatch_size=4)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
def test_llama_on_real_ranks() -> None:
    """Two key-value heads over four ranks, one sample at a time: what is split is split along other dims."""
    plan = check_parity(*FAMILIES["llama"](), 4, 1e-5, dp=1, tp_axes=(2, 2), pp=1, microbatch_size=1)
    linear = [label for stage in plan.stages for name, label in stage.choices.items() if "op:linear" in name]
    assert any(all("S(" in own for own in label.split(" | ")) for label in linear)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("pins", GRIDS, ids=str)
@pytest.mark.parametrize("model", ["gpt", "llama", "mixtral"])
def test_grids_on_real_ranks(model: str, pins: dict[str, Any]) -> None:
    given = example_gpt(torch.float64) if model == "gpt" else FAMILIES[model]()
    check_parity(*given, _devices(pins), 1e-9 if model == "gpt" else 1e-5, **{"microbatch_size": 2, **pins})


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
def test_checkpoints_outputs_and_plans(tmp_path: Path) -> None:
    """A checkpoint of two axes is one of any plan, inference runs on the same shards, a plan's file says the plan."""
    model, batch = example_gpt(torch.float64)
    losses, trained = reference(model, batch, SGD, steps=2)
    pins = autopar.Parallelism(dp=1, tp_axes=(2, 2), microbatch_size=1)
    with autopar.compile(model, cpu_cluster(4), batch, optimizer=SGD, parallelism=pins, max_grad_norm=1e9) as exe:
        assert exe.step(batch) == pytest.approx(losses[0], rel=1e-9)
        exe.save(tmp_path / "saved")
        assert exe.eval_step(batch) == pytest.approx(losses[1], rel=1e-9)
        plan = exe.plan
    assert autopar.Plan.from_json(plan.to_json()) == plan and plan.tp_axes == (2, 2)
    assert autopar.Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    for keywords in ({"plan": plan}, {"parallelism": autopar.Parallelism(tp=2)}):
        devices = 4 if "plan" in keywords else 2
        with autopar.compile(model, cpu_cluster(devices), batch, optimizer=SGD, max_grad_norm=1e9, **keywords) as exe:  # type: ignore[arg-type]
            exe.load(tmp_path / "saved")
            assert exe.step(batch) == pytest.approx(losses[1], rel=1e-9)
            assert largest_error(exe.full_state_dict(), trained.state_dict()) < 1e-9


# --- Found by the planner

TWO_LEVELS = """
schema = 1
name = "two by two"
device = "cpu"
num_devices = 4
backend = "gloo"
source = "made up"

[[levels]]
name = "near"
group_size = 2
start = "0 us"
latency = "1 us"
bandwidth = "100 GB/s"
efficiency = 1.0
source = "made up"

[[levels]]
name = "far"
start = "0 us"
latency = "1 us"
bandwidth = "10 MB/s"
efficiency = 1.0
source = "made up"
"""


def test_axes_are_found_where_tp_spans_levels_and_its_samples_are_fewer(tmp_path: Path) -> None:
    """Two samples over the slow links, features over the fast ones: one axis of four ranks can do neither."""
    (tmp_path / "cluster.toml").write_text(TWO_LEVELS)
    cluster = autopar.Cluster.load(str(tmp_path / "cluster.toml"))
    model, batch = example_gpt(n_embd=128)
    batch = {name: tensor[:2] for name, tensor in batch.items()}
    pins = {"dp": 1, "tp": 4, "pp": 1, "microbatch_size": 2}
    free = autopar.estimate(model, cluster, batch, parallelism=autopar.Parallelism(**pins))
    one = autopar.estimate(model, cluster, batch, parallelism=autopar.Parallelism(**pins, tp_axes=(4,)))
    assert free.plan.tp_axes == (2, 2) and one.plan.tp_axes == (4,)
    assert free.step_time_s < 0.9 * one.step_time_s
    assert any("tp=4 is 2 x 2 axes" in note and "the gap is to plans with one" in note for note in free.notes)


def test_where_several_axes_are_tried() -> None:
    assert pairs(8) == [(4, 2), (2, 4)] and pairs(4) == [(2, 2)] and pairs(6) == [(3, 2), (2, 3)]
    assert not pairs(2) and not pairs(3) and not pairs(7)
    fast, slow = Link(1e-6, 1e10), Link(1e-6, 1e9)
    assert spans_levels(Axes.of((2, 2), lambda axes: slow if 0 in axes else fast, NO_LINK))
    assert not spans_levels(Axes.of((2, 2), lambda axes: fast, NO_LINK))


# --- Pins


def test_axes_are_pinned_with_or_without_their_product() -> None:
    assert autopar.Parallelism(tp_axes=[2, 4]).tp == 8  # type: ignore[arg-type]
    assert autopar.Parallelism(tp=4, tp_axes=(4,)).tp_axes == (4,)
    for wrong in ((2, 1), (), (2, 2.0), "22"):
        with pytest.raises(ParallelismError, match="tp_axes must be"):
            autopar.Parallelism(tp_axes=wrong)  # type: ignore[arg-type]
    with pytest.raises(ParallelismError, match=r"tp_axes=\(2, 2\) multiply to 4, not to tp=2"):
        autopar.Parallelism(tp=2, tp_axes=(2, 2))


def test_a_plan_with_axes_that_are_none_is_refused() -> None:
    model, batch = example_gpt(n_layer=1)
    pins = autopar.Parallelism(tp_axes=(2, 2), microbatch_size=8)
    plan = autopar.estimate(model, cpu_cluster(4), batch, parallelism=pins).plan
    with pytest.raises(ConfigError, match="must multiply to it"):
        replace(plan, axes=Axes.of((2, 4), lambda axes: NO_LINK, NO_LINK))
    with pytest.raises(ConfigError, match="which are none"):
        autopar.Plan.from_json(plan.to_json().replace('"sizes"', '"size"'))
