"""Compare: real ranks measured beside their estimate, in a plain process and under a launcher."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import example_gpt, hf_gpt2
from parity import ADAMW, SGD, cpu_cluster
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)

import autopar
from autopar.comparison import PHASES, Comparison, Pair, comparison, event_kinds, op_events
from autopar.options import Options
from autopar.planning import Planned, plan_model
from autopar.runtime.measure import OTHER, OUTSIDE, held_bytes, op_kind
from cost_model.errors import ConfigError
from cost_model.parallelism import Parallelism

pytestmark = pytest.mark.usefixtures("shared_ranks")
ROOT = Path(__file__).resolve().parents[1]
MEMORY_LOW, MEMORY_HIGH = 0.0, 0.10
"""How far a peak may be estimated under and over what is measured on CPU."""


@functools.cache
def planned(**pins: Any) -> Planned:
    model, batch = example_gpt()
    options = Options.of(None, ADAMW, Parallelism(**pins), None, None, None)
    return plan_model(model, cpu_cluster(2), batch, options)


def compared(model: Any, batch: Any, steps: int = 3, optimizer: Any = ADAMW, **pins: Any) -> Comparison:
    parallelism = Parallelism(**pins)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=optimizer, parallelism=parallelism) as exe:
        return autopar.compare(exe, batch, steps, warmup=1)


def check_figures(found: Comparison, steps: int) -> None:
    """Laws of every comparison."""
    assert len(found.steps_s) == steps and min(found.steps_s) <= found.measured_step_time_s <= max(found.steps_s)
    assert MEMORY_LOW <= found.peak_memory_error <= MEMORY_HIGH
    assert found.resident_bytes > found.measured_peak_bytes
    for stage in found.stages:
        assert MEMORY_LOW <= (stage.peak_bytes.error or 0.0) <= MEMORY_HIGH
        assert tuple(stage.phases_s) == PHASES
        assert sum(p.estimated for p in stage.phases_s.values()) == pytest.approx(found.estimated_step_time_s)
        assert all(stage.phases_s[name].measured > 0 for name in ("forward", "backward", "optimizer"))
    measured = {kind for kind, pair in found.kinds_s.items() if pair.measured > 0}
    estimated = {kind for kind, pair in found.kinds_s.items() if pair.estimated > 0}
    assert estimated - {"other"} <= measured, "an estimated kind was not seen by the profiler"
    assert measured - estimated <= {OTHER, OUTSIDE}
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["step_time_error"] == found.step_time_error


@pytest.mark.parametrize(
    "pins",
    [
        *({"tp": 2}, {"pp": 2, "microbatch_size": 2}, {"dp": 2, "microbatch_size": 2}),
        *(pytest.param(pins, marks=pytest.mark.slow) for pins in ({"dp": 2}, {"pp": 2})),  # in one microbatch
    ],
    ids=str,
)
def test_real_ranks(pins: dict[str, int]) -> None:
    model, batch = example_gpt(block_size=64, n_embd=64)
    found = compared(model, batch, **pins)
    check_figures(found, 3)
    assert len(found.stages) == pins.get("pp", 1)
    communication = {"dp": "reduce_scatter", "tp": "all_reduce", "pp": "receive"}[next(iter(pins))]
    assert found.kinds_s[communication].measured > 0
    assert (found.stages[0].phases_s["transfer"].measured > 0) == ("pp" in pins)


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("gpipe", marks=pytest.mark.slow)])
def test_a_model_of_hugging_face_and_another_optimizer(schedule: str) -> None:
    model, batch = hf_gpt2("sdpa")
    check_figures(compared(model, batch, optimizer=SGD, pp=2, microbatch_size=2, schedule=schedule), 3)


def test_compare_plans_and_trains() -> None:
    model, batch = example_gpt()
    with autopar.compile(model, cpu_cluster(2), optimizer=SGD) as exe:
        before = exe.step(batch)
        autopar.compare(exe, batch, 2, warmup=0)
        assert exe.step(batch) < before
    with autopar.compile(model, cpu_cluster(1), optimizer=None) as exe:
        found = autopar.compare(exe, batch, 1)
    assert exe.plan.batch == 8
    assert found.stages[0].phases_s["optimizer"] == Pair(0.0, 0.0)


@pytest.mark.parametrize(("steps", "warmup"), [(0, 3), (1.5, 3), (True, 3), (1, -1)])
def test_wrong_counts_are_refused(steps: Any, warmup: Any) -> None:
    model, _ = example_gpt()
    with pytest.raises(ConfigError, match="must be a whole number of at least"):
        autopar.compare(autopar.compile(model, cpu_cluster(2)), {}, steps, warmup=warmup)


LAUNCHED = """
import json, os
import autopar
from models import example_gpt
from parity import ADAMW, cpu_cluster

model, batch = example_gpt(block_size=64, n_embd=64)
exe = autopar.compile(model, cpu_cluster(2), batch, optimizer=ADAMW, parallelism=autopar.Parallelism(tp=2))
found = autopar.compare(exe, batch, 2, warmup=1)
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(found.as_dict(), file)
exe.close()
"""


@pytest.mark.slow
def test_every_rank_of_a_launcher_gets_the_same(tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]
    script.write_text(f"import sys\nsys.path[:0] = {paths!r}\n{LAUNCHED}")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        f"{tmp_path}/rank",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    found = json.loads(told[0])
    assert MEMORY_LOW <= found["peak_memory_error"] <= MEMORY_HIGH
    assert len(found["steps_s"]) == 2


# --- What is laid beside what


def measured(step_s: float, peak_bytes: int, **phases_s: float) -> dict[str, Any]:
    """What one rank reports."""
    kinds = {"matmul": 0.5, OUTSIDE: 0.25}
    steps = (step_s, 2 * step_s, 9 * step_s)
    return {
        "steps_s": steps,
        "phases_s": {"step": step_s, **phases_s},
        "kinds_s": kinds,
        "peak_bytes": peak_bytes,
        "resident_bytes": 10 * peak_bytes,
    }


def test_the_slowest_and_the_fullest_rank_count() -> None:
    found = comparison(planned(dp=2, pp=1), cpu_cluster(2), [measured(1.0, 100), measured(2.0, 50)])
    assert found.steps_s == (2.0, 4.0, 18.0) and found.measured_step_time_s == 4.0
    assert (found.measured_peak_bytes, found.resident_bytes) == (100, 1000)
    assert found.step_time_error == pytest.approx((found.estimated_step_time_s - 4.0) / 4.0)
    assert found.peak_memory_error == pytest.approx((found.estimated_peak_bytes - 100) / 100)
    assert found.kinds_s["matmul"].measured == pytest.approx(0.5)


def test_what_no_phase_covers_is_other() -> None:
    ranks = [
        measured(1.0, 100, forward=0.2, receive_backward=0.1, send_forward=0.1, backward=0.3, optimizer=0.1),
        measured(1.0, 70, forward=0.1, receive_forward=0.3, reduce=0.2),
    ]
    found = comparison(planned(pp=2), cpu_cluster(2), ranks)
    first, second = (stage.phases_s for stage in found.stages)
    assert (first["transfer"].measured, second["transfer"].measured) == pytest.approx((0.2, 0.3))
    assert (first["other"].measured, second["other"].measured) == pytest.approx((0.2, 0.4))
    assert (found.stages[0].peak_bytes.measured, found.stages[1].peak_bytes.measured) == (100, 70)


@pytest.mark.parametrize("pins", [{"dp": 2}, {"tp": 2}, {"pp": 2, "microbatch_size": 1}], ids=str)
def test_estimated_phases_are_the_estimate(pins: dict[str, int]) -> None:
    plan = planned(**pins)
    found = comparison(plan, cpu_cluster(2), [measured(1.0, 100)] * 2)
    for stage, told in zip(found.stages, plan.estimate.stages, strict=True):
        count = plan.plan.microbatches
        assert stage.phases_s["forward"].estimated == pytest.approx(told.forward_s * count)
        assert stage.phases_s["backward"].estimated == pytest.approx(told.backward_s * count)
        assert stage.phases_s["optimizer"].estimated == pytest.approx(told.optimizer_s)
        assert all(pair.estimated >= -1e-12 for pair in stage.phases_s.values())
    kinds = sum(sum(stage.op_kinds_s.values()) for stage in plan.estimate.stages)
    assert sum(pair.estimated for pair in found.kinds_s.values()) == pytest.approx(kinds)


def test_a_summary_has_every_part() -> None:
    found = comparison(planned(pp=2), cpu_cluster(2), [measured(1.0, 100, forward=0.5)] * 2)
    text = found.summary()
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 100
    for word in ("step time", "peak memory of a rank", "resident size", "backward", "transfer", "matmul", OUTSIDE):
        assert word in text
    slower = dataclasses.replace(found, steps_s=(3.0,))
    assert "median of 1 steps, 3.00 s to 3.00 s" in slower.summary()


def test_no_error_without_a_measure() -> None:
    assert Pair(1.0, 0.0).error is None
    assert Pair(1.0, 2.0).error == -0.5


# --- Events


@pytest.mark.parametrize("pins", [{"dp": 2}, {"tp": 2}], ids=str)
def test_events_are_ops_that_exist(pins: dict[str, int]) -> None:
    kinds = event_kinds(planned(**pins).linked.program)
    assert kinds["aten::mm"] == "matmul" and kinds["aten::view"] == "view"
    assert kinds["autopar.all_reduce_"] == "all_reduce"
    missing = [e for e in kinds if e.startswith("aten::") and not torch._C._jit_get_schemas_for_operator(e)]
    assert missing == []


def test_events_of_an_op() -> None:
    assert op_events("aten.add.Tensor") == ("aten::add",)
    assert op_events("autopar.all_gather.default") == ("autopar.all_gather", "autopar.all_gather_")
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in op_events("autopar.attention.default")


def event(name: str, parent: Any = None) -> Any:
    return SimpleNamespace(name=name, cpu_parent=parent)


def test_only_the_outermost_op_of_the_step_counts() -> None:
    step = event("autopar.step")
    clone = event("aten::clone", step)
    hook = event("Optimizer.step#SGD.step", step)
    known = {"aten::clone": "copy", "aten::mm": "matmul", "Optimizer.step#SGD.step": "optimizer"}
    assert op_kind(clone, known) == "copy"
    assert op_kind(event("aten::copy_", clone), known) is None
    assert op_kind(hook, known) == "optimizer"
    assert op_kind(event("aten::mm", hook), known) is None
    assert op_kind(event("aten::mm", event("record", step)), known) == "matmul"
    assert op_kind(event("aten::strange", step), known) == OTHER
    assert op_kind(event("record", step), known) is None
    assert op_kind(event("aten::mm"), known) is None, "another thread's work is not the step's"


# --- Memory


def test_held_bytes_counts_what_the_rank_holds_once() -> None:
    flat = torch.zeros(100)
    weight = torch.zeros(64)[16:48]
    state = {weight: {"mean": torch.zeros(32), "step": torch.tensor(0.0)}}
    optimizer = SimpleNamespace(state=state, param_groups=[{"params": [weight], "lr": torch.tensor(0.1)}])
    executor = SimpleNamespace(
        params={"weight": weight}, spec={"params": {"weight": weight}}, grads={"weight": flat[:32]}, flat={"f": flat},
        optimizer=optimizer, stage=0,
    )  # fmt: skip
    idx = torch.zeros(8, dtype=torch.int64)
    bystander = torch.zeros(1000)
    held = held_bytes(executor, {"idx": idx, "targets": idx})  # type: ignore[arg-type]
    assert held == 4 * (100 + 32 + 32 + 1 + 1) + 8 * 8
    assert bystander.numel() == 1000
