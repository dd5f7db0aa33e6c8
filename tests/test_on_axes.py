"""Nodes repeat what one of them does where links between them are slower than its devices."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch
from models import Residual

import autopar
import autopar.on_axes

WIDTH = 1024


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_where_links_are_slow_nodes_repeat_what_one_does(nodes: int) -> None:
    with torch.device("meta"):
        model, batch = Residual(WIDTH).half(), {"x": torch.empty(64, 256, WIDTH, dtype=torch.float16)}
    cluster = autopar.Cluster.load("p3.8xlarge", 4 * nodes)
    found, one = autopar.estimate(model, cluster, batch), autopar.Cluster.load("p3.8xlarge", 4)
    assert found.plan.tp_axes == (nodes, 4) and any(f"is {nodes} x 4 axes" in note for note in found.notes)
    alone = autopar.estimate(model, one, batch, parallelism=autopar.Parallelism(overlap=False))
    assert found.step_time_s < 1.1 * alone.step_time_s, "where nothing is gathered over replicas, which lie otherwise"
    for pins in ({"dp": 4 * nodes}, {"dp": nodes, "tp": 4}, {"pp": nodes, "tp": 4}, {"dp": 4, "pp": nodes}):
        pinned = autopar.estimate(model, cluster, batch, parallelism=autopar.Parallelism(**pins))
        assert found.step_time_s < pinned.step_time_s


def test_ctrl_c_leaves_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    with torch.device("meta"):
        model, batch = Residual(WIDTH).half(), {"x": torch.empty(64, 256, WIDTH, dtype=torch.float16)}
    monkeypatch.setattr(autopar.on_axes, "search", interrupted)
    found = autopar.estimate(model, autopar.Cluster.load("p3.8xlarge", 8), batch)
    assert len(found.plan.tp_axes) == 1
