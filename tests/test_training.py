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
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

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


class Stacked(torch.nn.Module):
    """Four blocks with norms, so that stages may have two parts of the chain each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)) for _ in range(4)]
        self.blocks = torch.nn.ModuleList(blocks).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return torch.nn.functional.mse_loss(x, y)


def matrices_decay(parameters: Any) -> torch.optim.Optimizer:
    """AdamW that spares norms and biases."""
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0, "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.01)


def warmed_up(optimizer: Any) -> Any:
    return SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, T_max=6)], milestones=[2]
    )


PIPELINES: list[dict[str, Any]] = [
    {"schedule": "1f1b"},
    {"schedule": "gpipe"},
    {"schedule": "interleaved", "virtual_stages": 2},
    {"schedule": "zero_bubble"},
]


@pytest.mark.parametrize("pins", PIPELINES, ids=lambda pins: pins["schedule"])
def test_hooks_schedulers_and_groups_under_every_schedule(pins: dict[str, Any]) -> None:
    """Told of every update once, with the rates that it used, also where it took several batches."""
    torch.manual_seed(1)
    given = [{"x": torch.randn(8, 8).double(), "y": torch.randn(8, 8).double()} for _ in range(5)]
    model, records = Stacked(), list[StepRecord]()
    optimizer = matrices_decay(list(model.parameters()))
    rates = warmed_up(optimizer)
    expected: list[tuple[Any, ...]] = []
    for step, part in enumerate((given[:1], given[1:4], given[4:]), start=1):
        optimizer.zero_grad()
        losses = [model(**batch) for batch in part]
        (sum(losses) / len(part)).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        expected.append((step, *(float(v) for v in (sum(losses).detach() / len(part), norm, *rates.get_last_lr()))))
        optimizer.step()
        rates.step()
    parallelism = autopar.Parallelism(pp=2, microbatch_size=2, **pins)
    with autopar.compile(
        Stacked(), TWO, given[0], optimizer=matrices_decay, scheduler=warmed_up, parallelism=parallelism,
        max_grad_norm=MAX_NORM,
    ) as exe:  # fmt: skip
        exe.add_hook(records.append)
        exe.step(given[0])
        for batch in given[1:4]:
            exe.step(batch, update=False)
            exe.eval_step(given[0])
        assert exe.clip_grad_norm_(MAX_NORM) == pytest.approx(expected[1][2], rel=1e-9)
        exe.update()
        exe.step(given[4])
        assert largest_error(exe.full_state_dict(), model.state_dict()) < 1e-6
    found = [(r.step, r.loss, r.grad_norm, *r.learning_rates) for r in records]
    assert [pytest.approx(each, rel=1e-6) for each in expected] == found
    assert [(r.samples, r.loss_scale, r.skipped) for r in records] == [(n, 1.0, False) for n in (8, 24, 8)]
    assert all(record.seconds > 0 for record in records)


def test_groups_that_ranks_could_not_follow_are_refused_before_a_step() -> None:
    with autopar.compile(Regression(), TWO, BATCH, optimizer=ADAMW, parallelism=autopar.Parallelism(dp=2)) as exe:
        group = exe.optimizer.param_groups[0]
        for use, message in [
            (lambda: exe.optimizer.add_param_group({"params": [torch.zeros(1)]}), "ranks hold the groups"),
            (exe.optimizer.state_dict, r"exe\.save\(folder\) writes it"),
            (lambda: exe.optimizer.load_state_dict({}), r"exe\.load\(folder\) reads"),
        ]:
            with pytest.raises(ConfigError, match=message):
                use()
        for wrong in ("fast", None):
            group["lr"] = wrong
            with pytest.raises(ConfigError, match=f"'lr' of group 0 of exe.optimizer was 0.01 and is {wrong!r}"):
                exe.step(BATCH)
        del group["lr"]
        with pytest.raises(ConfigError, match="group 0 of exe.optimizer has lost its 'lr'; put it back"):
            exe.step(BATCH)
        group["lr"] = 0.01
        assert math.isfinite(exe.step(BATCH, update=False)) and exe.steps == 0
        for norm in (-1.0, math.nan):
            with pytest.raises(ConfigError, match="max_norm must be above 0"):
                exe.clip_grad_norm_(norm)
        exe.update()
        assert exe.steps == 1


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
