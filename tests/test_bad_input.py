"""Bad input gets a clear, typed error with a next move, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
import re
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import example_gpt
from parity import ADAMW, SGD, cpu_cluster
from regression import BATCH, TWO, Regression, estimate
from torch import Tensor, nn
from user_optimizers import Limiting

import autopar
from autopar.planner import flat_solver
from autopar.planner.search import Configuration
from autopar.planner.smallest_cap import smallest_cap
from autopar.planner.solution import Infeasible, Solution
from cost_model.errors import (
    AutoparError,
    BatchError,
    ConfigError,
    InfeasiblePlanError,
    ParallelismError,
    PlanMismatchError,
    ProblemSizeError,
    TraceError,
    UnknownNameError,
    UnsupportedError,
    WorldSizeError,
)
from cost_model.units import parse_bytes


class Branches(Regression):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        if x.sum() > 0:
            x = x * 2
        return super().forward(x, y)


class WrongShapes(Regression):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return (x @ y[:3]).sum()


class Looks(Regression):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return {"a": 1}["b"]


class NoLoss(Regression):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.outputs(x)


class Logits(Regression):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return {"logits": self.outputs(x)}


class NoGradient(Regression):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(x, y)


class Deep(Regression):
    def outputs(self, x: Tensor) -> Tensor:
        return super().outputs(super().outputs(super().outputs(x)))


class KnowsItsBatch(Regression):
    """Takes another way for batches of one size."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = super().forward(x if x.shape[0] == 8 else -x, y)
        return loss


class MixesSamples(Regression):
    def outputs(self, x: Tensor) -> Tensor:
        return super().outputs(x).cumsum(0)


# --- The model


def test_a_model_that_cannot_be_traced_shows_the_users_line() -> None:
    with pytest.raises(TraceError, match=r"(?s)data-dependent.*next: .*torch\.where") as caught:
        estimate(Branches())
    place, line, code = re.fullmatch(r"(.+):(\d+): (.+)", caught.value.source or "").groups()
    assert (Path(place).name, code) == (Path(__file__).name, "if x.sum() > 0:")
    assert Path(__file__).read_text().splitlines()[int(line) - 1].strip() == code


@pytest.mark.parametrize(
    ("model", "message", "code"),
    [
        (WrongShapes, r"RuntimeError: .*\[8, 8\] X \[3, 8\]", "return (x @ y[:3]).sum()"),
        (Looks, "KeyError: 'b'", 'return {"a": 1}["b"]'),
    ],
)
def test_a_model_that_fails_by_itself_is_not_blamed_on_tensor_values(
    model: type[nn.Module], message: str, code: str
) -> None:
    with pytest.raises(TraceError, match=rf"(?s){message}.*next: run the model once") as caught:
        estimate(model())
    assert (caught.value.source or "").endswith(code)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NoLoss(), r"no scalar loss but a tensor float32\[8, 8\]: reduce it"),
        (Logits(), r"no scalar loss but a dict: .* pass loss_fn\(outputs, inputs\)"),
        (NoGradient(), r"no gradient flows from the loss to a parameter \(to 'up.weight', say\): .*no_grad"),
        (Regression().requires_grad_(False), "requires_grad=True; unfreeze some, or pass optimizer=None"),
        (nn.Sequential(), "no scalar loss"),
        (Regression, "built, not the class Regression"),
        (torch.relu, r"must be a torch\.nn\.Module .* not a builtin"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_without_anything_to_train(model: nn.Module, message: str) -> None:
    inputs = (BATCH["x"],) if isinstance(model, nn.Sequential) else BATCH
    with pytest.raises(ConfigError, match=message):
        estimate(model, inputs)


def test_a_loss_without_parameters_is_refused_whatever_the_optimizer() -> None:
    def loss_fn(outputs: Tensor, inputs: Any) -> Tensor:
        return (outputs * outputs).mean()

    with pytest.raises(ConfigError, match="no parameter of the model: there is nothing to train"):
        estimate(nn.ReLU(), (BATCH["x"],), loss_fn=loss_fn, optimizer=None)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda outputs, inputs: outputs, ConfigError, r"loss_fn returns .* tensor float32\[8, 8\]"),
        (lambda outputs, inputs: outputs.argmax(), ConfigError, r"loss_fn returns .* tensor int64\[\]"),
        (lambda outputs, inputs: None, ConfigError, "loss_fn returns no scalar loss but a NoneType"),
        (lambda outputs, inputs: inputs["labels"], TraceError, "KeyError: 'labels'"),
        ("cross_entropy", ConfigError, "loss_fn must be callable or None, not str"),
    ],
)
def test_a_loss_fn_that_gives_no_loss(loss_fn: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(NoLoss(), {"x": BATCH["x"]}, loss_fn=loss_fn)


def test_meta_tensors_are_enough_to_estimate_and_too_little_to_train() -> None:
    model = Regression().to("meta")
    whole = estimate(model, {name: tensor.to("meta") for name, tensor in BATCH.items()})
    assert whole == dataclasses.replace(estimate(Regression()), search_s=whole.search_s)
    with autopar.compile(model, TWO, BATCH, optimizer=SGD) as exe:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"'down.bias' of the model is on the meta device.*autopar\.estimate"):
                exe.step(BATCH)
        assert exe._ranks is None, "workers were started for nothing"


# --- Inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({1, 2}, "must be a dict .* or a tuple .*, not set"),
        (BATCH["x"], "not Tensor"),
        ({}, "hold no tensor with a batch dim"),
        ({"x": torch.tensor(1.0), "y": 2.0}, "hold no tensor with a batch dim"),
        ({"x": torch.ones(0, 8), "y": torch.ones(0, 8)}, "hold no samples"),
        ({1: BATCH["x"]}, "has the key 1"),
        ({"x": np.ones((8, 8)), "y": BATCH["y"]}, r"'x' is a ndarray; pass tensors \(torch.as_tensor\)"),
        ({"x": {"a.b": BATCH["x"], "a": {"b": BATCH["x"]}}}, "two batch inputs are both called 'x.a.b'"),
        ({"x": BATCH["x"]}, r"do not fit Regression.forward\(x, y\): missing a required argument: 'y' \(given: x\)"),
        ({**BATCH, "z": 1}, "got an unexpected keyword argument 'z'"),
        ((*BATCH.values(), 3), r"too many positional arguments \(given: 3 by position\)"),
    ],
)
def test_inputs_that_are_no_batch_of_the_model(inputs: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        estimate(Regression(), inputs)


def test_any_mapping_is_a_dict() -> None:
    assert estimate(Regression(), UserDict(BATCH)).plan == estimate(Regression()).plan


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (
            {"microbatch_size": 3},
            "a batch of 8 cannot be cut into microbatches of 3; microbatch_size can be 1, 2, 4, 8",
        ),
        ({"microbatch_size": 16}, "microbatch_size can be 1, 2, 4, 8"),
        ({"dp": 2, "microbatch_size": 8}, "the 4 samples of each of dp=2 replicas .* microbatch_size can be 1, 2, 4$"),
    ],
)
def test_a_batch_that_microbatches_do_not_divide(pins: dict[str, int], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        estimate(Regression(), **pins)


def test_a_batch_that_replicas_do_not_divide() -> None:
    with pytest.raises(BatchError, match="a batch of 8 does not divide among dp=3 replicas"):
        estimate(Regression(), cluster=cpu_cluster(3), dp=3)


@pytest.mark.parametrize("pins", [{"dp": 2}, {"microbatch_size": 1}])
def test_a_batch_that_must_stay_whole(pins: dict[str, int]) -> None:
    with pytest.raises(ParallelismError, match="the batch cannot be split: .* different ops.* leave dp and microbatch"):
        estimate(KnowsItsBatch(), **pins)


class Turned(nn.Module):
    """Its state has samples along dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNN(3, 3)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return self.cell(x.transpose(0, 1), state)[0].square().mean()


def test_samples_along_another_dim_are_named() -> None:
    given = {"x": torch.zeros(4, 5, 3), "state": torch.zeros(1, 4, 3)}
    pins = autopar.Parallelism(dp=2)
    with pytest.raises(ParallelismError, match=r"'state' is \[1, 4, 3\].*pass it transposed(?s:.*)leave dp and"):
        autopar.estimate(Turned(), TWO, given, parallelism=pins)


def test_samples_that_meet_need_one_microbatch() -> None:
    with pytest.raises(ParallelismError, match="all samples .* one microbatch, of 4 samples; leave"):
        estimate(MixesSamples(), dp=2, microbatch_size=1)


# --- Pins, caps, keywords


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"dp": 2, "tp": 2, "pp": 1}, "dp=2 x tp=2 x pp=1 is 4, which is not the cluster's 2"),
        ({"dp": 1, "tp": 1, "pp": 1}, "is 1, which is not the cluster's 2 .* leave one degree None"),
        ({"dp": 3}, "dp=3 does not divide the cluster's 2"),
        ({"tp": 2, "pp": 2}, "tp=2 x pp=2 is 4, which does not divide"),
        ({"placement": (0, 0)}, "must name each of the devices 0 to 1 once"),
        ({"dp": 0}, "dp must be a positive integer or None, not 0"),
        ({"tp": "2"}, "tp must be a positive integer or None, not '2'"),
        ({"zero": 4}, "zero must be 0, 1, 2, 3 or None"),
        ({"schedule": "f1b1"}, "schedule must be one of gpipe, 1f1b"),
        ({"placement": "01"}, "placement must be a list of device numbers or None, not '01'"),
        ({"placement": 3}, "placement must be a list of device numbers"),
    ],
)
def test_pins_that_cannot_be(pins: dict[str, Any], message: str) -> None:
    with pytest.raises(ParallelismError, match=message):
        estimate(Regression(), **pins)


def test_more_stages_than_the_model_has_segments() -> None:
    with pytest.raises(ParallelismError, match="pp=8 is more than the 2 segments the model can be cut into"):
        estimate(Regression(), cluster=cpu_cluster(8), pp=8)


def test_more_virtual_stages_than_the_model_has_segments_are_not_blamed_on_microbatches() -> None:
    message = "pp=4 x virtual_stages=4 is more than the 2 segments the model can be cut into"
    with pytest.raises(ParallelismError, match=message):
        estimate(Regression(), cluster=cpu_cluster(4), pp=4, virtual_stages=4)


def test_a_number_of_microbatches_that_virtual_stages_cannot_run_is_said() -> None:
    with pytest.raises(ParallelismError, match="needs a multiple of pp=2 microbatches, not 1"):
        estimate(Deep(), pp=2, virtual_stages=2, microbatch_size=8)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"memory_cap": "30GiBs"}, "unknown unit 'GiBs'; did you mean 'GiB'"),
        ({"memory_cap": -5}, "must be finite and not negative"),
        ({"parallelism": {"dp": 2}}, "must be an autopar.Parallelism, not dict"),
        ({"plan": "plan.json"}, r"must be an autopar.Plan \(see Plan.load\), not str"),
        (
            {"optimizer": torch.optim.SGD(Regression().parameters())},
            "optimizer must be callable or None, not SGD: pass func",
        ),
        ({"optimizer": lambda parameters: None}, "returned a NoneType, not a torch.optim.Optimizer"),
        ({"cluster": "dgx2-v100-32gb"}, r"must be an autopar.Cluster, not a str; see autopar.Cluster.load"),
    ],
)
def test_keywords_of_the_wrong_kind(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate(Regression(), **keywords)


def test_a_graph_too_large_for_the_flat_solver_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate(Regression(), tp=2, solver="flat").gap == 0.0
    monkeypatch.setattr(flat_solver, "MOST_VARIABLES", 10)
    with pytest.raises(ProblemSizeError, match=r"of dp=1 tp=2 pp=1 microbatch_size=\d .* more than the 10 .*; use the"):
        estimate(Regression(), tp=2, solver="flat")


def test_a_program_of_a_search_is_not_written_for_a_plan_that_is_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a given plan is not searched; drop one"):
        estimate(Regression(), plan=estimate(Regression()).plan, write_lp=tmp_path / "stages.lp")


def test_an_unknown_device_or_cluster_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown device 'v100-sxm2-16g'; did you mean 'v100-sxm2-16gb'"):
        autopar.Cluster.from_matrix(
            device="v100-sxm2-16g", latency_s=np.zeros((2, 2)), bandwidth_bytes_per_s=np.ones((2, 2))
        )
    with pytest.raises(UnknownNameError, match="did you mean 'dgx2-v100-32gb'"):
        autopar.Cluster.load("dgx2-v100-32g")


def test_an_optimizer_that_couples_parameters_keeps_them_in_one_stage() -> None:
    clipped = functools.partial(Limiting, lr=0.1)
    found = estimate(Regression(), optimizer=clipped)
    assert found.plan.pp == 1 and any("couples parameters" in note for note in found.notes)
    held = [text for key, text in found.plan.stages[0].choices.items() if key.startswith("input:")]
    assert not any("S(" in text for text in held)
    with pytest.raises(UnsupportedError, match=r"pp=2 splits the parameters.*Limiting.*leave pp None"):
        estimate(Regression(), optimizer=clipped, pp=2)
    given = estimate(Regression(), pp=2).plan
    with pytest.raises(UnsupportedError, match=r"pp=2 splits the parameters"):
        estimate(Regression(), optimizer=clipped, plan=given)


def test_a_cap_beyond_the_device_and_idle_devices_are_said() -> None:
    wide = {name: torch.zeros(8, 512) for name in ("x", "y")}
    notes = estimate(Regression(512), wide, memory_cap="1PiB", tp=2).notes
    assert any("the memory cap of 1024 TiB is more than a device's" in note for note in notes)
    assert not any("do the same work" in note for note in notes)
    odd = {name: torch.zeros(7, 3) for name in ("x", "y")}
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    alone = estimate(model, (odd["x"],), loss_fn=lambda outputs, _: outputs.pow(2).mean(), tp=2)
    assert any("the 2 devices of each tp group do the same work" in note for note in alone.notes)


def test_a_cluster_of_gpus_is_not_run_on_a_machine_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cluster = autopar.Cluster.load("p3.8xlarge", num_devices=4)
    with autopar.compile(Regression(), cluster, BATCH) as exe:
        with pytest.raises(ConfigError, match=r"4 CUDA device\(s\) and this machine 1.*autopar.estimate"):
            exe.step(BATCH)


def test_parameters_stay_whole_under_an_optimizer_that_is_not_elementwise() -> None:
    found = estimate(Regression(), optimizer=functools.partial(torch.optim.Adafactor, lr=0.1), tp=2)
    assert not any(key.startswith("input:") and "S(" in text for key, text in found.plan.stages[0].choices.items())
    assert any("not elementwise: parameters are not split" in note for note in found.notes)


# --- Memory


CAPPED: dict[str, tuple[int, dict[str, Any]]] = {
    "one device": (1, {}),
    "automatic": (4, {}),
    "tp": (2, {"tp": 2, "microbatch_size": 4}),
    "dp": (2, {"dp": 2}),
    "pp": (2, {"pp": 2}),
    "gpipe": (2, {"pp": 2, "schedule": "gpipe", "microbatch_size": 2}),
    "adamw": (2, {"optimizer": ADAMW}),
}
SMALL = ("automatic", "tp", "adamw")
QUICK = ("tp",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CAPPED])
def test_the_needed_cap_suffices_and_a_hundredth_less_does_not(name: str) -> None:
    devices, keywords = CAPPED[name]
    model, batch = (Regression(), BATCH) if name in SMALL else example_gpt(n_layer=1)
    attempt = functools.partial(estimate, model, batch, cpu_cluster(devices), **keywords)
    with pytest.raises(InfeasiblePlanError) as caught:
        attempt(memory_cap="1 KiB")
    needed = caught.value.needed_bytes
    found = attempt(memory_cap=needed)
    assert 0.8 * needed < found.peak_bytes <= needed
    with pytest.raises(InfeasiblePlanError):
        attempt(memory_cap=int(0.99 * needed))


def test_the_smallest_cap_in_the_message_suffices_as_it_is_written() -> None:
    with pytest.raises(InfeasiblePlanError) as caught:
        estimate(Regression(), memory_cap=0, dp=1, tp=1, pp=2)
    message = str(caught.value)
    assert caught.value.tensors and caught.value.stage in (0, 1)
    assert re.match(
        r"no plan fits under 0 B per device; .* \(stage \d binds: .* B.*\)\. Next: raise memory_cap", message
    )
    written = re.search(r"smallest cap that would do is ([\d.]+ KiB)", message)
    assert written is not None
    assert estimate(Regression(), memory_cap=written[1], dp=1, tp=1, pp=2).peak_bytes <= parse_bytes(written[1])


def test_a_smallest_cap_is_found_where_smaller_ones_do_and_do_not() -> None:
    tried = []

    def attempt(cap: int) -> Solution | Infeasible:
        tried.append(cap)
        c = Configuration(1, 1, 1, "1f1b", 1, 1)
        return Solution(c, (), 1.0, 1.0, 0.0, ()) if cap >= 1000 else Infeasible(1000, 0, c, ())

    def exact(found: Solution) -> int:
        return 1000

    def roomy(found: Solution) -> int:
        return 1400

    for peak_bytes, likely in itertools.product((exact, roomy), (3000, 900, 1000, 1)):
        cap, _ = smallest_cap(attempt, peak_bytes, 10, likely)
        assert 1000 <= cap <= 1000 / 0.995
        assert cap in tried and any(cap * 0.995 <= lower < 1000 for lower in tried)
        assert peak_bytes is roomy or likely == 1 or len(tried) <= 4
        tried.clear()


# --- Errors as objects


@pytest.mark.parametrize(
    "error",
    [
        InfeasiblePlanError(cap_bytes=1, needed_bytes=2**31, stage=1, tensors=(("w", 5),), advice="wait"),
        WorldSizeError(2, 3),
        PlanMismatchError("batch", 1, 2),
        ProblemSizeError(9, 8, "tp=2"),
        TraceError("no", "file.py:1: x"),
        UnknownNameError("device", "v10", ["v100"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes_whole(error: AutoparError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
