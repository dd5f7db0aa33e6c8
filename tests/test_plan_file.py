"""Plans from elsewhere: used as they are, or refused with a reason."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import cpu_cluster
from regression import BATCH, Regression, estimate

import autopar
from cost_model.errors import ConfigError, InfeasiblePlanError, ParallelismError, PlanMismatchError


@pytest.fixture(scope="module")
def plan() -> autopar.Plan:
    return estimate(Regression(), tp=2).plan


def test_a_given_plan_is_used_as_it_is(plan: autopar.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    found = estimate(Regression(), plan=autopar.Plan.load(tmp_path / "plan.json"))
    assert found.plan == plan and "the plan was given, not searched" in found.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an autopar plan: Expecting value"),
        ('{"version": 1, "mod', "not an autopar plan: Unterminated string"),
        ("[]", "not an autopar plan: no 'version' field"),
        ({"dp": None}, "the plan has dp = None, which is no int"),
        ({"dp": "1"}, "the plan has dp = '1', which is no int"),
        ({"dp": True}, "the plan has dp = True"),
        ({"stages": None}, "the plan has stages = None, which is no list"),
        ({"stages": [{"first": 0}]}, "stage 0 of the plan lacks 'first_segment'"),
        ({"stages": ["all"]}, "stage 0 of the plan is 'all', not an object"),
        ({"colour": 1}, "the plan has the unknown field 'colour'"),
        ({"dp": 3}, "dp=3 replicas with .* they must multiply to the batch"),
        ({"tp": 0}, "tp must be at least 1, not 0"),
        ({"tp": [0]}, "tp must be at least 1, not"),
        ({"tp": [1, 2]}, "tp must be one number, or one for each of 1 stages"),
        ({"tp": ["2"]}, "tp must be at least 1, not"),
        ({"placement": [0, 0]}, "must place each of them once"),
        ({"placement": [0, "1"]}, "must place each of them once"),
        ({"schedule": "1b1f"}, "unknown schedule '1b1f'; did you mean '1f1b'"),
        ({"segment_labels": ["up"]}, r"must cover its 1 segment\(s\) in order"),
    ],
)
def test_a_broken_plan_file(plan: autopar.Plan, tmp_path: Path, text: Any, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text if isinstance(text, str) else json.dumps({**json.loads(plan.to_json()), **text}))
    with pytest.raises(ConfigError, match=message) as caught:
        autopar.Plan.load(file)
    assert str(file) in str(caught.value)


def test_a_plan_file_that_lacks_a_field_is_of_another_version_or_is_not_there(
    plan: autopar.Plan, tmp_path: Path
) -> None:
    raw = json.loads(plan.to_json())
    with pytest.raises(ConfigError, match="the plan lacks 'tp'; write one with plan.save"):
        autopar.Plan.from_json(json.dumps({name: value for name, value in raw.items() if name != "tp"}))
    with pytest.raises(PlanMismatchError, match="the plan's version is 99 but here it is 7; plan again"):
        autopar.Plan.from_json(json.dumps({**raw, "version": 99}))
    with pytest.raises(ConfigError, match=r"cannot read the plan '.*none.json': No such file"):
        autopar.Plan.load(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not an autopar plan: 'utf-8'"):
        autopar.Plan.load(tmp_path / "binary")


def test_a_plan_of_version_2_says_what_it_did(plan: autopar.Plan) -> None:
    raw = {**json.loads(plan.to_json()), "version": 2}
    del raw["virtual_stages"], raw["precision"]
    assert autopar.Plan.from_json(json.dumps(raw)) == plan


def test_a_plan_of_version_3_has_one_mesh_for_all_stages(plan: autopar.Plan) -> None:
    raw = {**json.loads(plan.to_json()), "version": 3}
    assert autopar.Plan.from_json(json.dumps(raw)) == plan


SAID = {"model": "same parts with other shapes, dtypes", "cluster": "other devices or links"}


@pytest.mark.parametrize(
    ("field", "use"),
    [
        ("batch", lambda plan: estimate(Regression(), {k: v[:4] for k, v in BATCH.items()}, plan=plan)),
        ("model", lambda plan: estimate(Regression().double(), {k: v.double() for k, v in BATCH.items()}, plan=plan)),
        ("number of devices", lambda plan: estimate(Regression(), cluster=cpu_cluster(4), plan=plan)),
        ("cluster", lambda plan: estimate(Regression(), cluster=cpu_cluster(2, 2e9), plan=plan)),
    ],
)
def test_a_plan_for_something_else(plan: autopar.Plan, field: str, use: Callable[[autopar.Plan], object]) -> None:
    said = SAID.get(field, f"the plan's {field} is .* but here it is")
    with pytest.raises(PlanMismatchError, match=f"{said}.*; plan again for this {field}") as caught:
        use(plan)
    assert caught.value.field == field and caught.value.expected != caught.value.found


def test_a_plan_for_other_parts_names_the_first_that_differs(plan: autopar.Plan) -> None:
    other = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))

    def loss_fn(made: torch.Tensor, _: object) -> torch.Tensor:
        return made.mean()

    with pytest.raises(PlanMismatchError, match="another model: it has '.*' where this one has '0'"):
        autopar.estimate(other, cpu_cluster(2), (torch.randn(plan.batch, 4),), loss_fn=loss_fn, plan=plan)


def test_a_plan_is_written_into_a_folder_that_is_there(plan: autopar.Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the plan .*nowhere.*name a file in a folder"):
        plan.save(tmp_path / "nowhere" / "plan.json")


def _edited(plan: autopar.Plan, **choices: str) -> autopar.Plan:
    stage = plan.stages[0]
    known = {**stage.choices, **{name.replace("__", ":"): text for name, text in choices.items()}}
    return dataclasses.replace(plan, stages=(dataclasses.replace(stage, choices=known),))


def test_a_plan_edited_beyond_use(plan: autopar.Plan) -> None:
    with pytest.raises(ConfigError, match=r"choice for 'op:relu' is 'S\(7\)', but it can be .*S\(1\) -> S\(1\)"):
        estimate(Regression(), plan=_edited(plan, op__relu="S(7)"))
    with pytest.raises(ConfigError, match="choice for 'op:gelu', which stage 0 does not have"):
        estimate(Regression(), plan=_edited(plan, op__gelu="R -> R"))
    with pytest.raises(PlanMismatchError, match="segment_labels"):
        estimate(Regression(), plan=dataclasses.replace(plan, segment_labels=("a", "b")))


def test_a_plan_against_pins_cap_or_optimizer(plan: autopar.Plan) -> None:
    with pytest.raises(ParallelismError, match="dp=2 is pinned but the given plan has dp=1; drop one"):
        estimate(Regression(), plan=plan, dp=2)
    with pytest.raises(InfeasiblePlanError, match="the given plan does not fit under 1.0 KiB") as caught:
        estimate(Regression(), plan=plan, memory_cap="1KiB")
    assert estimate(Regression(), plan=plan, memory_cap=caught.value.needed_bytes).plan == plan


def test_a_plan_that_splits_parameters_against_an_optimizer_that_needs_them_whole() -> None:
    wide = {name: torch.ones(8, 512) for name in BATCH}
    plan = estimate(Regression(512), wide, tp=2).plan
    assert any("S(" in text for name, text in plan.stages[0].choices.items() if name.startswith("input:"))
    with pytest.raises(ConfigError, match="the optimizer is not elementwise, so parameters stay whole"):
        estimate(Regression(512), wide, plan=plan, optimizer=functools.partial(torch.optim.Adafactor, lr=0.1))
