"""fp16: the loss is scaled, updates with infinite gradients are skipped on every rank, and the scale is kept."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_reference import OneDevice
from models import example_gpt
from parity import SGD, cpu_cluster, largest_error
from regression import BATCH, Regression
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import nn

import autopar
from autopar import Parallelism, Precision
from autopar.executable import StepRecord
from autopar.runtime.norm import CHUNK, sum_of_squares
from autopar.runtime.scaling import GROWTH, INITIAL, INTERVAL, LossScaler
from cost_model.errors import NonFiniteLossError

HALF = Precision(params="fp16", grads="fp32", master="fp32")
PURE = Precision(compute="fp16", grads="fp16", reduce="fp16")


def compiled(model: nn.Module, batch: Any, precision: Precision = HALF, **pins: Any) -> autopar.Executable:
    devices = math.prod(pins.get(name, 1) for name in ("dp", "tp", "pp"))
    parallelism = Parallelism(**{"dp": 1, "tp": 1, "pp": 1, **pins})
    return autopar.compile(
        model, cpu_cluster(devices), batch, optimizer=SGD, precision=precision, parallelism=parallelism
    )


# --- As torch.amp.GradScaler


def test_the_scale_is_that_of_torch() -> None:
    """Step by step beside torch.amp.GradScaler, through infinite gradients and a whole interval."""
    ours = LossScaler(torch.device("cpu"))
    parameter = nn.Parameter(torch.zeros(3))
    torchs, update = torch.amp.GradScaler("cpu"), torch.optim.SGD([parameter], lr=0.0)
    torchs.scale(torch.zeros(()))
    for step in range(INTERVAL + 20):
        bad = step in (0, 3, 4, 10)
        gradient = torch.tensor([1.0, math.inf if bad else 2.0, math.nan if step == 3 else 0.5])
        parameter.grad = gradient.clone()
        ours.unscale([gradient])
        assert ours.adjust() == bad
        torchs.unscale_(update)
        torchs.step(update)
        torchs.update()
        assert torch.equal(gradient, parameter.grad) or bad
        assert float(ours.scale) == torchs.get_scale(), step
    assert float(ours.scale) == INITIAL / 2**4 * GROWTH


def test_the_scale_stays_finite() -> None:
    scaler = LossScaler(torch.device("cpu"))
    scaler.load((2.0**127, INTERVAL - 1))
    scaler.unscale([torch.ones(2)])
    assert not scaler.adjust() and scaler.state() == (2.0**127, 0)


def test_the_norm_of_half_gradients_is_beyond_their_range() -> None:
    row = torch.full((2 * CHUNK + 5,), 300.0, dtype=torch.float16)
    assert not torch.linalg.vector_norm(row).isfinite()
    assert float(sum_of_squares(row)) == pytest.approx(row.numel() * 300.0**2, rel=1e-5)
    assert float(sum_of_squares(row[:7].bfloat16())) == pytest.approx(7 * 300.0**2, rel=1e-6)
    assert float(sum_of_squares(row[:7].double())) == pytest.approx(7 * 300.0**2, rel=1e-15)


# --- In the program


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("precision", "pins"),
    [
        (HALF, {"dp": 2, "zero": 1}),
        pytest.param(HALF, {"pp": 2, "microbatch_size": 2}, marks=pytest.mark.slow),
        pytest.param(HALF, {"tp": 2}, marks=pytest.mark.slow),
        pytest.param(HALF, {"dp": 2, "zero": 3}, marks=pytest.mark.slow),
        pytest.param(PURE, {"dp": 2, "zero": 0}, marks=pytest.mark.slow),
        pytest.param(Precision(compute="fp16"), {"dp": 2, "tp": 2, "zero": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_one_device(precision: Precision, pins: dict[str, Any]) -> None:
    model, batch = example_gpt(tied=True)
    one = OneDevice(model, batch, precision, SGD)
    expected = [one.step(batch, INITIAL) for _ in range(3)]
    with compiled(model, batch, precision, **pins) as exe:
        assert [exe.step(batch) for _ in range(3)] == pytest.approx(expected, rel=1e-4)
        assert exe.steps == 3 and exe.loss_scale == INITIAL
        state = exe.full_state_dict()
    assert largest_error({n: state[n] for n in one.state()}, one.state()) < 3e-3


@pytest.mark.usefixtures("thread_ranks")
def test_an_infinite_gradient_skips_the_update_on_every_rank() -> None:
    """One replica's samples overflow fp16; the other's do not. The step counts for nothing but the scale."""
    large = {name: value.clone() for name, value in BATCH.items()}
    large["x"][4:] = 1e30
    records: list[StepRecord] = []
    with compiled(Regression(), BATCH, dp=2, zero=1) as exe:
        exe.add_hook(records.append)
        before = exe.full_state_dict()
        loss = exe.step(large)
        assert not math.isfinite(loss) and exe.loss_scale == INITIAL / 2 and exe.steps == 0
        assert all(torch.equal(before[name], value) for name, value in exe.full_state_dict().items())
        assert math.isfinite(exe.step(BATCH)) and exe.steps == 1
        assert any(not torch.equal(before[name], value) for name, value in exe.full_state_dict().items())
    assert [(r.step, r.skipped, r.loss_scale) for r in records] == [
        (0, True, INITIAL / 2),
        (1, False, INITIAL / 2),
    ]


@pytest.mark.usefixtures("thread_ranks")
def test_a_loss_that_no_scale_helps_is_an_error() -> None:
    broken = {**BATCH, "y": torch.full_like(BATCH["y"], math.nan)}
    with compiled(Regression(), BATCH) as exe:
        for _ in range(17):
            last = functools.partial(exe.step, broken)
            if exe.loss_scale < 2:
                break
            last()
        with pytest.raises(NonFiniteLossError):
            last()
    with compiled(Regression(), BATCH, Precision(params="bf16")) as exe, pytest.raises(NonFiniteLossError):
        exe.step(broken)


def test_the_check_of_all_ranks_is_priced() -> None:
    model, batch = example_gpt()
    with compiled(model, batch, dp=2, zero=0) as half, compiled(model, batch, Precision(params="bf16"), dp=2) as other:
        steps = [exe.planned.linked.program.stages[0].step for exe in (half, other)]
        assert "run.unscale_gradients()" in half.code(0) and "if run.adjust_scale():" in half.code(0)
        assert "unscale" not in other.code(0) and other.loss_scale == 1.0
    found = [sum(c.axis == "world" for c in step.collectives) for step in steps]
    assert found == [2, 1]
    assert len([c for c in steps[0].optimizer_costs if c.op == "aten.mul_.Scalar"]) >= 1


@pytest.mark.usefixtures("shared_ranks")
def test_a_checkpoint_keeps_the_scale(tmp_path: Path) -> None:
    large = {**BATCH, "x": torch.full_like(BATCH["x"], 1e30)}
    with compiled(Regression(), BATCH, dp=2) as exe:
        exe.step(large)
        exe.step(BATCH)
        exe.save(tmp_path)
        expected = exe.step(BATCH)
    with compiled(Regression(), BATCH, tp=2) as exe:
        exe.load(tmp_path)
        assert exe.loss_scale == INITIAL / 2 and exe.steps == 1
        assert exe.step(BATCH) == pytest.approx(expected, rel=1e-3)
