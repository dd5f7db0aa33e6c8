"""Pipeline schedules as they run: each equals one device, holds what is estimated, and can be saved and loaded."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import example_gpt, hf_gpt2
from parity import ADAMW, check_parity, cpu_cluster, largest_error
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)
from thread_ranks import thread_ranks  # noqa: F401  (a fixture)
from torch import Tensor, nn

import autopar
from autopar import Parallelism
from autopar.options import Options
from autopar.planning import Job
from cost_model.errors import BatchError, ParallelismError
from cost_model.sketch import sketched_step_s, with_virtual_stages, with_weight_blocks

MEMORY_LOW, MEMORY_HIGH = 0.0, 0.10
SHAPES: dict[str, dict[str, Any]] = {
    "gpipe": {},
    "1f1b": {},
    "interleaved": {"virtual_stages": 2},
    "zero_bubble": {},
}


class SharedBlocks(nn.Module):
    """One residual block that is used four times."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(4):
            x = x + self.down(torch.relu(self.up(x)))
        return nn.functional.mse_loss(x, y)


class Reading(nn.Module):
    """A layer that reads two values."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other, self.out = nn.Linear(32, 128), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, made: Tensor, context: Tensor) -> Tensor:
        return made + self.out(torch.tanh(self.own(made) + self.other(context)))


class Reminded(nn.Module):
    """Every layer reads what the first one makes, beside what the one before it makes: a decoder and its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(16, 32), nn.ModuleList(Reading() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        made = context = torch.tanh(self.first(x))
        for layer in self.layers:
            made = layer(made, context)
        return made.square().mean()


def _name(pins: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in pins.items())


def _devices(pins: dict[str, Any]) -> int:
    return math.prod(pins.get(name, 1) for name in ("dp", "tp", "pp"))


def _check(pins: dict[str, Any], **changes: Any) -> autopar.Plan:
    """Four blocks and tied embeddings, in double precision, with AdamW; samples that the stages divide."""
    model, batch = example_gpt(torch.float64, n_layer=4, tied=True, **changes)
    batch = {name: value[: 6 if pins["pp"] == 3 else 8] for name, value in batch.items()}
    return check_parity(model, batch, _devices(pins), 1e-8, optimizer=ADAMW, **{"dp": 1, "tp": 1, **pins})


# --- Equal to one device


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "pins",
    [
        pytest.param({"pp": 2, "virtual_stages": 2, "microbatch_size": 2}, marks=pytest.mark.slow),
        {"pp": 2, "virtual_stages": 3, "microbatch_size": 4, "recompute": "full"},
        {"pp": 2, "tp": 2, "virtual_stages": 2, "microbatch_size": 1, "recompute": "selective"},
        {"pp": 2, "dp": 2, "virtual_stages": 2, "microbatch_size": 1, "zero": 3, "recompute": "full"},
        {"pp": 3, "virtual_stages": 2, "microbatch_size": 1},
    ],
    ids=_name,
)
def test_interleaved_stages(pins: dict[str, Any]) -> None:
    plan = _check(pins)
    assert (plan.schedule, plan.virtual_stages) == ("interleaved", pins["virtual_stages"])
    assert len(plan.stages) == plan.pp * plan.virtual_stages


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "pins",
    [
        pytest.param({"pp": 2, "microbatch_size": 2}, marks=pytest.mark.slow),
        {"pp": 2, "microbatch_size": 8},
        {"pp": 2, "tp": 2, "microbatch_size": 1, "recompute": "full"},
        {"pp": 2, "dp": 2, "microbatch_size": 1, "zero": 3, "recompute": "selective"},
        {"pp": 4, "microbatch_size": 1},
    ],
    ids=_name,
)
def test_zero_bubble(pins: dict[str, Any]) -> None:
    assert _check({**pins, "schedule": "zero_bubble"}).schedule == "zero_bubble"


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "pins",
    [
        pytest.param({"pp": 2, "window": 2, "microbatch_size": 1}, marks=pytest.mark.slow),
        {"pp": 4, "window": 3, "microbatch_size": 1, "recompute": "full"},
        {"pp": 2, "dp": 2, "window": 5, "microbatch_size": 1, "zero": 3},
    ],
    ids=_name,
)
def test_windows(pins: dict[str, Any]) -> None:
    plan = _check(pins)
    assert (plan.schedule, plan.window) == ("1f1b", pins["window"])
    assert "1f1b in windows of" in str(plan)


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("pins", [{"virtual_stages": 2}, {"schedule": "zero_bubble"}, {"window": 3}], ids=_name)
def test_new_schedules_on_real_ranks(pins: dict[str, Any]) -> None:
    _check({"pp": 2, "dp": 2, "microbatch_size": 1, "zero": 2, **pins})


def test_what_the_stage_before_waits_for_holds_no_gradient_of_a_weight() -> None:
    """Every gradient enters its buffer in ``weight``, which makes the products with what was saved."""
    model, batch = example_gpt(n_layer=4, attention="explicit")
    for schedule in ("1f1b", "zero_bubble"):
        pins = Parallelism(dp=1, tp=1, pp=2, schedule=schedule, microbatch_size=2)
        exe = autopar.compile(model, cpu_cluster(2), batch, parallelism=pins)
        first, last = (stage.chunks[0] for stage in exe.planned.linked.program.stages)
        counts = [Counter(i.op for i in block.instructions) for block in last.backwards]
        written = [c["autopar.accumulate_product.default"] for c in counts]
        products = [c["aten.mm.default"] + n for c, n in zip(counts, written, strict=True)]
        accumulated = [c["autopar.accumulate.default"] + n for c, n in zip(counts, written, strict=True)]
        if schedule == "1f1b":
            whole, all_accumulated = products[0], accumulated[0]
        else:
            assert first.weight is None and last.weight is not None
            assert sum(products) == whole and products[0] == products[1] == whole // 2
            assert accumulated == [0, all_accumulated]


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("zero", [0, 2])
def test_weights_that_several_chunks_of_a_stage_share(zero: int) -> None:
    """Every block has the same weights: each stage holds one copy for both of its chunks."""
    torch.manual_seed(0)
    model = SharedBlocks().double()
    batch = {"x": torch.randn(8, 16, dtype=torch.float64), "y": torch.randn(8, 16, dtype=torch.float64)}
    dp = 2 if zero else 1
    pins = {"dp": dp, "tp": 1, "pp": 2, "virtual_stages": 2, "microbatch_size": 1, "zero": zero}
    check_parity(model, batch, 2 * dp, 1e-9, optimizer=ADAMW, **pins)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", SHAPES)
def test_every_schedule_with_every_saving_on_real_ranks(schedule: str, zero: int, recompute: str) -> None:
    for mesh in ({"dp": 2, "pp": 2}, {"dp": 1, "tp": 1, "pp": 4}) if not zero else ({"dp": 2, "pp": 2},):
        shape = {**SHAPES[schedule], **({"virtual_stages": 2} if SHAPES[schedule] else {})}
        pins = {**mesh, **shape, "schedule": schedule, "zero": zero, "recompute": recompute, "microbatch_size": 1}
        changes = {"n_layer": 6} if mesh["pp"] == 4 else {}
        model, batch = example_gpt(torch.float64, tied=True, **{"n_layer": 4, **changes})
        check_parity(model, batch, 4, 1e-8, optimizer=ADAMW, **{"tp": 1, **pins})


@pytest.mark.slow
@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", SHAPES)
def test_every_schedule_with_every_saving_on_eight_ranks(schedule: str, zero: int, recompute: str) -> None:
    mesh = {"dp": 2, "tp": 2, "pp": 2, "microbatch_size": 1, **SHAPES[schedule]}
    assert _check({**mesh, "schedule": schedule, "zero": zero, "recompute": recompute}).tp == 2


# --- Memory


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=pytest.mark.slow) if name in ("gpipe", "1f1b") else name for name in SHAPES]
)
def test_real_ranks_hold_what_is_estimated(schedule: str) -> None:
    model, batch = example_gpt(n_layer=4, n_embd=64, tied=True)
    pins = Parallelism(pp=2, schedule=schedule, microbatch_size=1, **SHAPES[schedule])
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=ADAMW, parallelism=pins) as exe:
        found = autopar.compare(exe, batch, 1, warmup=1)
    for stage in found.stages:
        error = stage.peak_bytes.error
        assert error is not None and MEMORY_LOW <= error <= MEMORY_HIGH, (schedule, stage)


@pytest.mark.usefixtures("shared_ranks")
def test_a_message_of_several_values_is_held_whole() -> None:
    """As long as one of them is read."""
    pins = Parallelism(dp=1, tp=1, pp=2, schedule="gpipe", microbatch_size=8)
    batch = {"x": torch.randn(64, 64, 16)}
    with autopar.compile(Reminded(), cpu_cluster(2), batch, optimizer=ADAMW, parallelism=pins) as exe:
        found = autopar.compare(exe, batch, 1, warmup=1)
    for stage in found.stages:
        error = stage.peak_bytes.error
        assert error is not None and MEMORY_LOW <= error <= MEMORY_HIGH, stage


@pytest.mark.usefixtures("shared_ranks")
def test_what_attention_works_in_is_estimated() -> None:
    """Held the most: a backward that makes activations again, with gradients kept for their weights' part."""
    model, _ = example_gpt(n_layer=4, block_size=128)
    tokens = torch.randint(0, 64, (8, 129), generator=torch.Generator().manual_seed(1))
    batch = {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    pins = Parallelism(dp=1, tp=1, pp=2, schedule="zero_bubble", recompute="full", microbatch_size=2)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=ADAMW, parallelism=pins) as exe:
        found = autopar.compare(exe, batch, 1, warmup=1)
    for stage in found.stages:
        error = stage.peak_bytes.error
        assert error is not None and MEMORY_LOW <= error <= MEMORY_HIGH, stage


# --- Everything else that training does


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize(
    "pins", [{"virtual_stages": 2}, pytest.param({"schedule": "zero_bubble"}, marks=pytest.mark.slow)], ids=_name
)
def test_clipping_accumulation_evaluation_and_checkpoints(pins: dict[str, Any], tmp_path: Path) -> None:
    """What a schedule trained and saved, plain data parallelism loads and goes on with."""
    model, batch = example_gpt(torch.float64, n_layer=4, tied=True)
    schedules = [Parallelism(dp=2, tp=1, pp=2, microbatch_size=1, zero=1, **pins), Parallelism(dp=4, tp=1, pp=1)]
    losses, norms, states = [], [], []
    for number, parallelism in enumerate(schedules):
        with autopar.compile(model, cpu_cluster(4), batch, optimizer=ADAMW, parallelism=parallelism) as exe:
            if number:
                exe.load(tmp_path)
            else:
                exe.step(batch)
                exe.save(tmp_path)
            exe.step(batch, update=False)
            exe.step(batch, update=False)
            norms.append(exe.clip_grad_norm_(0.5))
            exe.update()
            losses.append(exe.eval_step(batch))
            states.append(exe.full_state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert largest_error(states[0], states[1]) < 1e-8


@pytest.mark.usefixtures("thread_ranks")
def test_inference_under_interleaved_stages() -> None:
    """Batches whose microbatches the stages would not take in turn are cut otherwise, or refused by name."""
    model, batch = hf_gpt2("eager", layers=4)
    model.eval()
    pins = Parallelism(dp=1, tp=1, pp=2, virtual_stages=2, microbatch_size=2)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=ADAMW, parallelism=pins) as exe, torch.no_grad():
        for count in (6, 2):
            part = {name: value[:count] for name, value in batch.items()}
            assert torch.allclose(exe.eval().forward(part).logits, model(**part).logits, atol=1e-5)
        with pytest.raises(BatchError, match="3 samples .* pass a multiple of 2"):
            exe.forward({name: value[:3] for name, value in batch.items()})


# --- Plans


def test_pins_that_leave_no_room() -> None:
    model, batch = example_gpt()
    for pins, message in (
        ({"dp": 2, "pp": 1, "schedule": "interleaved"}, "at least 2 stages of at least 2 virtual stages, not pp=1"),
        (
            {"pp": 2, "virtual_stages": 24, "microbatch_size": 1},
            "pp=2 x virtual_stages=24 is more than the .* segments",
        ),
        ({"pp": 2, "virtual_stages": 2, "microbatch_size": 8}, "a multiple of pp=2 microbatches, not 1; change"),
    ):
        with pytest.raises(ParallelismError, match=message):
            autopar.estimate(model, cpu_cluster(2), batch, parallelism=Parallelism(**{"dp": 1, "tp": 1, **pins}))
    with pytest.raises(ParallelismError, match="schedule='1f1b' has one virtual stage on each stage, not 2"):
        Parallelism(schedule="1f1b", virtual_stages=2)


def test_a_plan_file_says_which_part_is_where(tmp_path: Path) -> None:
    model, batch = example_gpt(n_layer=4)
    pins = Parallelism(dp=1, tp=1, pp=2, virtual_stages=2, microbatch_size=1)
    found = autopar.estimate(model, cpu_cluster(2), batch, parallelism=pins)
    found.plan.save(tmp_path / "plan.json")
    plan = autopar.Plan.load(tmp_path / "plan.json")
    assert plan == found.plan
    parts = list(itertools.chain(*zip(*(plan.labels(stage) for stage in range(2)), strict=True)))
    assert [label for part in parts for label in part] == list(plan.segment_labels)
    assert "interleaved x 2" in str(plan).splitlines()[0] and str(plan).count(" | ") == 2
    again = autopar.estimate(model, cpu_cluster(2), batch, plan=plan)
    assert again.step_time_s == found.step_time_s and len(again.stages) == 2


# --- The planner's choice


@pytest.mark.parametrize("microbatch_size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_schedule_that_is_fastest_is_chosen(microbatch_size: int) -> None:
    """Of those that are possible; a sketch of each says what the rewritten program then takes."""
    model, batch = example_gpt(n_layer=4, n_embd=128)
    found = {}
    for schedule in (None, *SHAPES):
        pins = Parallelism(dp=1, tp=1, pp=2, schedule=schedule, microbatch_size=microbatch_size)
        job = Job.of(model, cpu_cluster(2, 1e11), batch, Options.of(None, ADAMW, pins, None, None, None))
        found[schedule] = job.planned(job.decide(0.0))
    times = {schedule: each.estimate.step_time_s for schedule, each in found.items()}
    assert times[None] <= min(times.values()) and times[None] < times["1f1b"]
    assert any("was chosen after the search" in note for note in found[None].estimate.notes)
    cluster, program = cpu_cluster(2, 1e11), found["1f1b"].linked.program
    assert sketched_step_s(with_weight_blocks(program), cluster) == pytest.approx(times["zero_bubble"], rel=0.02)
    ends = [part.last_segment for part in found["interleaved"].plan.stages]
    assert sketched_step_s(with_virtual_stages(program, ends), cluster) == pytest.approx(times["interleaved"], rel=0.02)


def test_pins_and_caps_keep_a_schedule_away() -> None:
    model, batch = example_gpt(n_layer=4, n_embd=128)

    def schedule(memory_cap: int | None = None, **pins: Any) -> str:
        parallelism = Parallelism(**{"dp": 1, "tp": 1, "pp": 2, "microbatch_size": 2, **pins})
        cluster = cpu_cluster(2, 1e11)
        return autopar.estimate(model, cluster, batch, parallelism=parallelism, memory_cap=memory_cap).plan.schedule

    assert schedule() != "1f1b" == schedule(schedule="1f1b")
    assert schedule(virtual_stages=1) == "zero_bubble"
    assert schedule(pp=1, dp=2) == "1f1b"
    slow = cpu_cluster(2, 1e3)
    pins = Parallelism(dp=1, tp=1, pp=2, microbatch_size=1)
    assert autopar.estimate(model, slow, batch, parallelism=pins).plan.virtual_stages == 1


def test_a_window_is_chosen_where_messages_are_slow() -> None:
    """A hop of 20 ms beside blocks of less: with one microbatch under way for each later stage every one waits."""
    model, batch = example_gpt(n_layer=4)
    far = np.full((2, 2), 0.02)
    cluster = autopar.Cluster.from_matrix(device="cpu", latency_s=far, bandwidth_bytes_per_s=far * 1e12)
    found = {}
    for window in (None, 1, 2):
        pins = Parallelism(dp=1, tp=1, pp=2, schedule="1f1b", microbatch_size=1, window=window)
        found[window] = autopar.estimate(model, cluster, batch, parallelism=pins)
    assert found[None].plan.window > 1 and found[1].plan.window == 1 and found[2].plan.window == 2
    assert found[None].step_time_s <= found[2].step_time_s < 0.8 * found[1].step_time_s


@pytest.mark.parametrize(
    ("schedule", "message"), [("gpipe", "'gpipe' has no window of 2"), ("1f2b", "must be one of gpipe")]
)
def test_windows_are_of_1f1b(schedule: str, message: str) -> None:
    with pytest.raises(ParallelismError, match=message):
        Parallelism(schedule=schedule, window=2)
    assert Parallelism(window=2).schedule == "1f1b"
