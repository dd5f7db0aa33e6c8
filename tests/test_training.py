"""Training as its user knows it, against one device: clipping, accumulation, evaluation, hooks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import example_gpt
from parity import ADAMW, SGD, cpu_cluster, largest_error
from regression import BATCH, TWO, Regression
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)

import autopar
from autopar.executable import StepRecord
from autopar.gradient_norm import NORM
from cost_model.errors import ConfigError, NonFiniteLossError

pytestmark = pytest.mark.usefixtures("thread_ranks")
MAX_NORM = 0.5


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    _, batch = example_gpt()
    return [{name: tensor.roll(shift, 1) for name, tensor in batch.items()} for shift in range(count)]


def one_device(updates: list[list[Any]], max_norm: float | None) -> tuple[list[float], list[float], torch.nn.Module]:
    """Losses of all batches, norms of all updates, and the model; each update takes the mean over its batches."""
    model, _ = example_gpt(torch.float64, n_layer=1)
    optimizer = ADAMW(model.parameters())
    losses, norms = [], []
    for group in updates:
        optimizer.zero_grad()
        for batch in group:
            loss = model(**batch)
            (loss / len(group)).backward()
            losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)))
        optimizer.step()
    return losses, norms, model


def compiled(devices: int, *, max_grad_norm: float | None = None, **pins: Any) -> Any:
    model, batch = example_gpt(torch.float64, n_layer=1)
    parallelism = autopar.Parallelism(**pins)
    return autopar.compile(
        model, cpu_cluster(devices), batch, optimizer=ADAMW, parallelism=parallelism, max_grad_norm=max_grad_norm
    )


def slow(pins: dict[str, int]) -> Any:
    return pytest.param(pins, marks=pytest.mark.slow)


PLANS = [
    {"pp": 2, "microbatch_size": 2},
    {"dp": 2, "tp": 2, "pp": 1, "zero": 1},
    slow({"dp": 2, "tp": 1}),
    slow({"tp": 2}),
    slow({"dp": 2, "tp": 1, "zero": 2}),
    slow({"dp": 2, "pp": 2, "zero": 3, "microbatch_size": 2}),
]


@pytest.mark.parametrize("pins", PLANS, ids=str)
def test_clipping_and_accumulation_are_those_of_one_device(pins: dict[str, int]) -> None:
    """Tied embeddings lie in both stages, norms are whole on both shards: each counts once.

    What is clipped by hand is clipped once more by every update, which changes it by a millionth of the norm's excess.
    """
    first, second, third, fourth = batches(4)
    devices = math.prod(pins[axis] for axis in ("dp", "tp", "pp") if axis in pins)
    norms, records = [], []
    with compiled(devices, max_grad_norm=MAX_NORM, **pins) as exe:
        exe.add_hook(records.append)
        losses = [exe.step(first)]
        norms.append(exe.grad_norm)
        losses += [exe.step(second, update=False), exe.step(third, update=False)]
        assert exe.eval_step(first) != pytest.approx(losses[0])
        norms.append(exe.clip_grad_norm_(MAX_NORM))
        exe.update()
        losses += [exe.step(second, update=False), exe.step(fourth)]
        norms.append(exe.grad_norm)
        state = exe.full_state_dict()
    expected, expected_norms, trained = one_device([[first], [second, third], [second, fourth]], MAX_NORM)
    assert losses == pytest.approx(expected, rel=1e-8)
    assert norms == pytest.approx(expected_norms, rel=1e-7) and min(norms) > MAX_NORM
    assert largest_error(state, trained.state_dict()) < 1e-6
    assert [(r.step, r.samples, r.learning_rates) for r in records] == [
        (1, 8, (0.01,)),
        (2, 16, (0.01,)),
        (3, 16, (0.01,)),
    ]
    assert [r.loss for r in records] == pytest.approx(
        [losses[0], (losses[1] + losses[2]) / 2, (losses[3] + losses[4]) / 2]
    )
    assert all(r.seconds > 0 for r in records) and records[2].grad_norm == norms[2]


def test_what_clips_is_priced_and_printed() -> None:
    def regression(max_grad_norm: float | None) -> autopar.Executable:
        pins = autopar.Parallelism(pp=2)
        return autopar.compile(Regression(), TWO, BATCH, parallelism=pins, max_grad_norm=max_grad_norm)

    with regression(None) as plain, regression(1.0) as clipping:
        for stage in clipping.planned.linked.program.stages:
            assert stage.step.collectives.count(NORM) == 2, "the norm's, and the loss's which looks the same"
        assert clipping.estimate.step_time_s > plain.estimate.step_time_s
        assert "run.clip_gradients(1.0)\n    run.update_parameters()" in clipping.code(1)
        assert "clip" not in plain.code(1)
    with pytest.raises(ConfigError, match="max_grad_norm must be above 0"):
        compiled(2, max_grad_norm=0.0)


@pytest.mark.parametrize("pins", [{"dp": 2}, {"pp": 2, "microbatch_size": 4}], ids=str)
def test_evaluation_leaves_everything_as_it_is(pins: dict[str, int]) -> None:
    with autopar.compile(Regression(), TWO, BATCH, optimizer=SGD, parallelism=autopar.Parallelism(**pins)) as exe:
        before = exe.full_state_dict()
        loss = exe.eval_step(BATCH)
        assert loss == exe.eval_step(BATCH) == pytest.approx(float(Regression()(**BATCH).detach()), rel=1e-6)
        assert all(torch.equal(tensor, before[name]) for name, tensor in exe.full_state_dict().items())
        assert exe.steps == 0 and exe.step(BATCH) == loss and exe.steps == 1


def test_steps_out_of_order_and_losses_that_are_not_numbers_are_errors() -> None:
    records: list[StepRecord] = []
    with autopar.compile(Regression(), TWO, BATCH, optimizer=SGD, parallelism=autopar.Parallelism(dp=2)) as exe:
        for use in (exe.update, lambda: exe.clip_grad_norm_(1.0)):
            with pytest.raises(ConfigError, match=r"no gradients for .*call step\(batch, update=False\) before"):
                use()
        exe.step(BATCH, update=False)
        with pytest.raises(ConfigError, match="gradients are accumulated"):
            exe.save("nowhere")
        exe.clip_grad_norm_(1.0)
        with pytest.raises(ConfigError, match=r"call update\(\) before the next batch"):
            exe.step(BATCH)
        exe.update()
        remove = exe.add_hook(records.append)
        exe.step(BATCH)
        with pytest.raises(NonFiniteLossError, match=r"the loss is nan after 2 update\(s\).*load the last checkpoint"):
            exe.step({"x": BATCH["x"] * math.nan, "y": BATCH["y"]}, update=False)
        remove()
        assert math.isfinite(exe.step(BATCH)) and exe.steps == 3
    assert [record.step for record in records] == [2] and records[0].grad_norm is None


class Normed(torch.nn.Module):
    """A batch norm between two layers; running statistics move with every batch that is accumulated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
        self.body = torch.nn.Sequential(*layers).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.body(x), y)


@pytest.mark.parametrize("pins", [{"dp": 2, "tp": 1, "pp": 1}, slow({"dp": 1, "tp": 2, "pp": 1})])
def test_batch_norm_while_gradients_accumulate(pins: dict[str, int]) -> None:
    model, plain = Normed(), Normed()
    torch.manual_seed(1)
    given = [{"x": torch.randn(8, 6).double(), "y": torch.randn(8, 3).double()} for _ in range(3)]
    optimizer = SGD(plain.parameters())
    for batch in given:
        (plain(**batch) / len(given)).backward()
    optimizer.step()
    parallelism = autopar.Parallelism(**pins)
    with autopar.compile(model, cpu_cluster(2), given[0], optimizer=SGD, parallelism=parallelism) as exe:
        for batch in given:
            exe.step(batch, update=False)
        exe.update()
        assert largest_error(exe.full_state_dict(), plain.state_dict()) < 1e-9
