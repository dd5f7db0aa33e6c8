"""Checkpoints on real ranks: what one plan saved another goes on from, with the losses of a run that never stopped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from masks import dropout_given
from models import example_gpt
from odd_models import inputs, queue_with_place
from parity import ADAMW, SGD, cpu_cluster, reference
from regression import BATCH, TWO, Regression
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR
from user_optimizers import Counting

import autopar
from autopar.checkpoint import LATEST
from cost_model.errors import BatchError, CheckpointError, ConfigError, WorkerError

pytestmark = pytest.mark.usefixtures("shared_ranks")
COSINE = functools.partial(CosineAnnealingLR, T_max=8)


def one_device(model: Any, batch: Any, optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    update = optimizer(model.parameters())
    rates = None if scheduler is None else scheduler(update)
    losses = []
    for _ in range(steps):
        update.zero_grad()
        loss = model(**batch)
        loss.backward()
        update.step()
        losses.append(float(loss.detach()))
        if rates is not None:
            rates.step(*([losses[-1]] if isinstance(rates, ReduceLROnPlateau) else []))
    return losses


def compiled(
    model: Any, batch: Any, devices: int, *, optimizer: Any = ADAMW, scheduler: Any = None, **pins: Any
) -> Any:
    return autopar.compile(
        model,
        cpu_cluster(devices),
        batch,
        optimizer=optimizer,
        scheduler=scheduler,
        parallelism=autopar.Parallelism(**pins),
    )


LAST = (2, {"pp": 2, "microbatch_size": 2})
LAST_OF_FOUR = (4, {"dp": 2, "tp": 1, "pp": 2, "microbatch_size": 2})


@pytest.mark.parametrize("last", [LAST, pytest.param(LAST_OF_FOUR, marks=pytest.mark.slow)], ids=str)
def test_a_chain_of_plans_goes_on_as_one_run(tmp_path: Path, last: tuple[int, dict[str, int]]) -> None:
    """tp2 -> dp2 -> pp2, or four ranks: fused projections of attention lie in three pieces in each shard."""
    plans: list[tuple[int, dict[str, int]]] = [(2, {"tp": 2}), (2, {"dp": 2, "tp": 1}), last]
    losses = []
    for position, (devices, pins) in enumerate(plans):
        model, batch = example_gpt(torch.float64, n_layer=1)
        with compiled(model, batch, devices, scheduler=COSINE, **pins) as exe:
            if position:
                assert exe.load(tmp_path / "run") == {"epoch": position}
                assert exe.steps == 2 * position
            losses += [exe.step(batch) for _ in range(2)]
            exe.save(tmp_path / "run", extra={"epoch": position + 1})
            rate = exe.optimizer.param_groups[0]["lr"]
            state = exe.full_state_dict()
    model, batch = example_gpt(torch.float64, n_layer=1)
    assert losses == pytest.approx(one_device(model, batch, ADAMW, COSINE, 6), rel=1e-9)
    assert rate == pytest.approx(1e-2 * (1 + torch.cos(torch.tensor(6 * torch.pi / 8)).item()) / 2)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(state[name], tensor, rtol=1e-7, atol=1e-9), name
    assert [part.name for part in (tmp_path / "run").iterdir() if part.is_dir()] == ["step-6"]


@pytest.mark.parametrize(
    "scheduler",
    [
        functools.partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        functools.partial(ReduceLROnPlateau, patience=0, threshold=0.9),
    ],
    ids=["lambda", "plateau"],
)
def test_schedulers_run_where_the_user_is(scheduler: Any) -> None:
    with compiled(Regression(), BATCH, 2, optimizer=SGD, scheduler=scheduler, dp=2) as exe:
        losses = [exe.step(BATCH) for _ in range(5)]
    assert losses == pytest.approx(one_device(Regression(), BATCH, SGD, scheduler, 5), rel=1e-5)


def test_groups_can_be_changed_by_hand_and_by_schedulers_of_ones_own(tmp_path: Path) -> None:
    """Two groups; pp=2 holds one of them on each stage."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.05}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    with compiled(Regression(), BATCH, 2, optimizer=optimizer, pp=2) as exe:
        rates = StepLR(exe.optimizer, step_size=1, gamma=0.5)
        losses = []
        for step in range(4):
            losses.append(exe.step(BATCH))
            rates.step()
            if step == 1:
                exe.optimizer.param_groups[1]["momentum"] = 0.5
        exe.save(tmp_path, extra={"rates": rates.state_dict()})
    with compiled(Regression(), BATCH, 2, optimizer=optimizer, dp=2) as exe:
        extra = exe.load(tmp_path)
        assert [group["lr"] for group in exe.optimizer.param_groups] == pytest.approx([0.1 / 16, 0.05 / 16])
        assert exe.optimizer.param_groups[1]["momentum"] == 0.5 and extra["rates"]["last_epoch"] == 4
        losses.append(exe.step(BATCH))
    model = Regression()
    update = optimizer(model.parameters())
    rates = StepLR(update, step_size=1, gamma=0.5)
    for step, found in enumerate(losses):
        loss = model(**BATCH)
        assert found == pytest.approx(float(loss.detach()), rel=1e-5)
        update.zero_grad()
        loss.backward()
        update.step()
        rates.step()
        if step == 1:
            update.param_groups[1]["momentum"] = 0.5


def test_what_an_optimizer_counts_in_its_groups_is_its_own(tmp_path: Path) -> None:
    """Neither a scheduler, which sends learning rates, nor a checkpoint resets it."""
    halving = functools.partial(StepLR, step_size=1, gamma=0.5)
    with compiled(Regression(), BATCH, 2, optimizer=Counting, scheduler=halving, dp=2) as exe:
        losses = [exe.step(BATCH) for _ in range(3)]
        exe.save(tmp_path)
    with compiled(Regression(), BATCH, 2, optimizer=Counting, scheduler=halving, pp=2) as exe:
        exe.load(tmp_path)
        losses += [exe.step(BATCH) for _ in range(2)]
    assert losses == pytest.approx(one_device(Regression(), BATCH, lambda p: Counting(list(p)), halving, 5), rel=1e-5)


def test_random_states_of_data_loading_go_on(tmp_path: Path) -> None:
    with compiled(Regression(), BATCH, 2, dp=2) as exe:
        exe.save(tmp_path)
        expected = torch.randperm(9).tolist()
        torch.randperm(9)
        exe.load(tmp_path)
        assert torch.randperm(9).tolist() == expected


class Dropping(torch.nn.Module):
    """Dropout between layers, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [[torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 8)] for _ in range(2)]
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(*each) for each in layers).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return torch.nn.functional.mse_loss(x, y)


TP_OF_FOUR = (4, {"dp": 2, "tp": 2, "pp": 1, "zero": 2})
DROPPING = [
    [(2, {"dp": 2, "zero": 3}), LAST],
    pytest.param([LAST, (2, {"tp": 2})], marks=pytest.mark.slow),
    pytest.param([(2, {"dp": 2}), LAST_OF_FOUR, TP_OF_FOUR, LAST], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("plans", DROPPING, ids=str)
def test_what_is_drawn_goes_on_under_every_plan(tmp_path: Path, plans: list[tuple[int, dict[str, int]]]) -> None:
    """Masks go by the seed, the step and the sample, so one device that was never stopped draws the same."""
    torch.manual_seed(1)
    batch, losses = {"x": torch.randn(8, 8).double(), "y": torch.randn(8, 8).double()}, []
    for position, (devices, pins) in enumerate(plans):
        with compiled(Dropping(), batch, devices, scheduler=COSINE, **pins) as exe:
            if position:
                exe.load(tmp_path / "run")
            losses += [exe.step(batch) for _ in range(2)]
            exe.eval_step(batch)
            exe.save(tmp_path / "run")
    model, expected = Dropping(), []
    update = ADAMW(model.parameters())
    rates = COSINE(update)
    for step in range(2 * len(plans)):
        update.zero_grad()
        with dropout_given(0, step):
            loss = model(**batch)
        loss.backward()
        update.step()
        rates.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-9)


def test_a_part_that_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    """By the error of every rank; the checkpoint before stays the newest."""
    with compiled(Regression(), BATCH, 2, optimizer=SGD, dp=2) as exe:
        exe.save(tmp_path)
        blocked = tmp_path / "step-1"
        with mock.patch("autopar.executable.new_part", lambda root, steps: "step-1"):
            exe.step(BATCH)
            blocked.mkdir()
            (blocked / ".metadata.tmp").mkdir()  # where torch writes what it renames last
            with pytest.raises(WorkerError, match=r"CheckpointError: checkpoint .*rank 0's part cannot be written"):
                exe.save(tmp_path)
    with compiled(Regression(), BATCH, 1, optimizer=SGD, dp=1) as exe:
        for file in (tmp_path / (tmp_path / LATEST).read_text()).glob("*.distcp"):
            file.unlink()
        with pytest.raises(WorkerError, match=r"CheckpointError: checkpoint .*part cannot be read .*load another"):
            exe.load(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    lazily = autopar.compile(Regression(), TWO)
    with pytest.raises(BatchError, match="nothing is planned yet"):
        lazily.load(tmp_path)
    with compiled(Regression(), BATCH, 2, optimizer=SGD, dp=2) as exe:
        with pytest.raises(CheckpointError, match="no complete checkpoint here"):
            exe.load(tmp_path)
        with pytest.raises(ConfigError, match="holds what a checkpoint cannot keep"):
            exe.save(tmp_path, extra={"function": Path("x").exists})
        exe.save(tmp_path)
        exe.step(BATCH)
        with pytest.raises(ConfigError, match="holds what a checkpoint cannot keep"):
            exe.save(tmp_path, extra=Regression)
        assert [part.name for part in tmp_path.glob("step-*")] == ["step-0"]
        assert (tmp_path / LATEST).read_text() == "step-0"
        assert exe.load(tmp_path) is None
    refusals = [
        (
            Regression(4),
            {n: t[:, :4] for n, t in BATCH.items()},
            {"optimizer": SGD},
            r"it has float32\[8\] for 'down.bias' but the model has float32\[4\]",
        ),
        (
            Regression(),
            BATCH,
            {"optimizer": ADAMW},
            "its optimizer: torch.optim.sgd.SGD, here: torch.optim.adamw.AdamW",
        ),
        (Regression(), BATCH, {"optimizer": SGD, "scheduler": COSINE}, "its scheduler: None, here: CosineAnnealingLR"),
    ]
    for model, batch, keywords, message in refusals:
        with compiled(model, batch, 2, dp=2, **keywords) as exe, pytest.raises(CheckpointError, match=message):
            exe.load(tmp_path)


def test_a_scheduler_that_cannot_be_made_is_refused() -> None:
    for factory, message in [
        (CosineAnnealingLR, "the scheduler factory failed on the optimizer: .*T_max"),
        (lambda optimizer: optimizer, "returned a ParameterGroups, not an LRScheduler"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compiled(Regression(), BATCH, 2, scheduler=factory)
    with pytest.raises(ConfigError, match="a scheduler needs an optimizer"):
        compiled(Regression(), BATCH, 2, optimizer=None, scheduler=COSINE)


def test_whole_numbers_are_saved_loaded_and_read_in_eval(tmp_path: Path) -> None:
    model, batch, plans = queue_with_place(), inputs(), [{"dp": 2, "tp": 1}, {"dp": 1, "tp": 2}]
    losses, trained = reference(model, batch, SGD)
    saving, loading = (autopar.Parallelism(pp=1, **pins) for pins in plans)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=SGD, parallelism=saving) as exe:
        assert [exe.step(batch) for _ in losses] == pytest.approx(losses)
        exe.save(tmp_path)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=SGD, parallelism=loading) as exe:
        exe.load(tmp_path)
        exe.eval()
        found, expected = exe.full_state_dict(), trained.state_dict()
        assert float(exe.eval_step(batch)) == pytest.approx(float(trained.eval()(**batch).detach()))
    for name in ("place", "counts", "seen"):
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
    assert expected["place"] == 8 and 0 < expected["seen"].sum() < 12
