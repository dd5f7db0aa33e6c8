"""What would make a plan fit: every way that an infeasible plan names is searched for, and holds."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from parity import ADAMW
from regression import TWO, Regression, estimate
from test_sizing import pairs

from autopar import relaxations
from cost_model.errors import InfeasiblePlanError, Relaxation

TIGHT: dict[str, Any] = {"tp": 2, "recompute": "none", "microbatch_size": 8}


def refused(**keywords: Any) -> InfeasiblePlanError:
    with pytest.raises(InfeasiblePlanError) as caught:
        estimate(Regression(), optimizer=ADAMW, **keywords)
    return caught.value


@pytest.mark.slow
def test_pins_that_keep_a_plan_from_fitting_are_named_and_the_others_too() -> None:
    cap = refused(memory_cap=0).needed_bytes
    found = refused(memory_cap=cap, **TIGHT)
    said = {each.what: each for each in found.relaxations}
    of_pin = {name: f"{name} left to the planner" for name in TIGHT}
    assert set(of_pin.values()) <= set(said) and any(each.fits for each in said.values())
    for name, what in of_pin.items():
        fewer = {key: value for key, value in TIGHT.items() if key != name}
        if said[what].fits:
            step_s = estimate(Regression(), optimizer=ADAMW, memory_cap=cap, **fewer).step_time_s
            assert step_s == pytest.approx(said[what].step_time_s)
        else:
            assert said[what].needed_bytes is None or said[what].needed_bytes > cap
    assert "What fits under this cap: " in str(found)


@pytest.mark.slow
def test_more_devices_are_tried_where_the_cluster_has_other_sizes() -> None:
    cap = int(0.9 * refused(memory_cap=0, cluster=pairs()).needed_bytes)
    (found,) = refused(memory_cap=cap, cluster=pairs()).relaxations
    assert found.what == "4 devices" and found.fits
    step_s = estimate(Regression(), cluster=pairs(4), optimizer=ADAMW, memory_cap=cap).step_time_s
    assert step_s == pytest.approx(found.step_time_s)
    assert refused(memory_cap=cap, cluster=TWO).relaxations == ()


@pytest.mark.slow
def test_numbers_of_devices_that_cannot_hold_the_parameters_are_not_tried() -> None:
    assert refused(memory_cap=64, cluster=pairs()).relaxations == ()


def test_an_interruption_keeps_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = relaxations._tried, []

    def stopped(*arguments: Any) -> Relaxation:
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(relaxations, "_tried", stopped)
    found = refused(memory_cap=64, **TIGHT)
    assert [each.what for each in found.relaxations] == ["tp left to the planner"]


def test_the_error_travels_with_them() -> None:
    given = (Relaxation("recompute left to the planner", 0.5, None), Relaxation("4 devices", None, 2048))
    error = InfeasiblePlanError(cap_bytes=1, needed_bytes=9, stage=0, tensors=(), advice="wait", relaxations=given)
    back = pickle.loads(pickle.dumps(error))
    assert back.relaxations == given and str(back) == str(error)
    assert str(error).endswith(
        "What fits under this cap: recompute left to the planner (0.5 s a step). What does not: 4 devices (2.0 KiB)"
    )
