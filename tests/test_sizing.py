"""Questions of capacity: each answer is held against plans at it and beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import example_gpt
from parity import ADAMW, cpu_cluster
from regression import BATCH, Regression

import autopar
from autopar import sizing
from autopar.cli import main
from cost_model.errors import ConfigError, InfeasiblePlanError, UnsupportedError

NODES = """
schema = 1
name = "pairs"
device = "cpu"
num_devices = 2
backend = "gloo"
source = "made up"

[[levels]]
name = "inside"
group_size = 2
start = "10 us"
latency = "5 us"
bandwidth = "4 GB/s"
efficiency = 1.0
source = "made up"

[[levels]]
name = "between"
start = "10 us"
latency = "5 us"
bandwidth = "1 GB/s"
efficiency = 1.0
source = "made up"
"""


def pairs(num_devices: int = 2) -> autopar.Cluster:
    return autopar.Cluster.from_toml(NODES, "pairs.toml", num_devices)


def fits(model: Any, cluster: autopar.Cluster, batch: Any, cap: int) -> bool:
    try:
        return autopar.estimate(model, cluster, batch, optimizer=ADAMW, memory_cap=cap).peak_bytes <= cap
    except InfeasiblePlanError:
        return False


def stacked(layers: int) -> tuple[torch.nn.Module, tuple[torch.Tensor], Any]:
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(layers)))
        return model, (torch.ones(4, 32),), lambda outputs, inputs: outputs.square().mean()


def test_a_cluster_has_other_sizes_where_a_file_describes_it() -> None:
    assert pairs().node_size == 2 and pairs(6).resized(2) == pairs(2)
    assert [level.name for level in pairs().levels] == ["inside"]
    assert [level.name for level in pairs().resized(8).levels] == ["inside", "between"]
    with pytest.raises(UnsupportedError, match="no row of equal nodes.*TOML file"):
        cpu_cluster(2).resized(4)


@pytest.mark.slow
def test_the_fewest_nodes_train_the_model_and_one_less_does_not() -> None:
    model, batch = Regression(), BATCH
    with pytest.raises(InfeasiblePlanError) as caught:
        autopar.estimate(model, pairs(2), batch, optimizer=ADAMW, memory_cap=0)
    cap = int(0.9 * caught.value.needed_bytes)
    found = autopar.size_nodes(model, pairs(), batch, optimizer=ADAMW, memory_cap=cap)
    nodes = found.figures["nodes"]
    assert nodes > 1 and found.figures["devices"] == 2 * nodes
    assert fits(model, pairs(2 * nodes), batch, cap) and not fits(model, pairs(2 * nodes - 2), batch, cap)
    assert found.estimate is not None and found.estimate.peak_bytes <= cap
    assert f"It trains on {nodes} node(s) of 2 device(s)" in found.summary()


def test_no_number_of_nodes_may_do() -> None:
    found = autopar.size_nodes(Regression(), pairs(), BATCH, optimizer=ADAMW, memory_cap="1 KiB", most_nodes=2)
    assert found.figures == {"nodes": None, "devices": None, "more_than": 2} and found.estimate is None
    assert "fewer than 3 node(s)" in found.summary()


def test_the_largest_model_fits_and_the_next_does_not() -> None:
    cap = 90_000
    found = autopar.size_model(stacked, pairs(), scale="layers", start=2, step=3, optimizer=ADAMW, memory_cap=cap)
    layers = found.figures["largest"]
    assert layers % 3 == 2 and layers > 2 and found.figures["too_large"] == layers + 3
    assert found.figures["parameters"] == layers * (32 * 32 + 32)

    def trains(layers: int) -> bool:
        model, inputs, loss_fn = stacked(layers)
        try:
            autopar.estimate(model, pairs(), inputs, loss_fn=loss_fn, optimizer=ADAMW, memory_cap=cap)
        except InfeasiblePlanError:
            return False
        return True

    assert trains(layers) and not trains(layers + 3)
    most = autopar.size_model(stacked, pairs(), start=2, most=4, optimizer=ADAMW, memory_cap=cap)
    assert most.figures["largest"] == 4 and most.figures["too_large"] is None
    none = autopar.size_model(stacked, pairs(), optimizer=ADAMW, memory_cap="1 KiB")
    assert none.figures["largest"] is None and none.figures["too_large"] == 1 and none.figures["needed_bytes"] > 1024


def test_days_and_cost_follow_from_the_step() -> None:
    model, batch = example_gpt(n_layer=1)
    step_s = autopar.estimate(model, pairs(), batch, optimizer=ADAMW).step_time_s
    days = autopar.size_days(model, pairs(), batch, tokens=1e6, optimizer=ADAMW).figures
    assert days["tokens_per_step"] == 8 * 16 and days["steps"] == math.ceil(1e6 / 128)
    assert days["days"] == pytest.approx(days["steps"] * step_s / 86400)
    cost = autopar.size_cost(model, pairs(), batch, price_per_device_hour=3.0, tokens=1e6, optimizer=ADAMW)
    assert cost.figures["cost_per_token"] == pytest.approx(3.0 * 2 * step_s / 3600 / 128)
    assert cost.figures["cost"] == pytest.approx(1e6 * cost.figures["cost_per_token"])
    json.dumps(cost.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tokens": 0}, "tokens must be a number above zero"),
        ({"tokens": math.inf}, "tokens must be a number above zero"),
        ({"tokens": 1e9}, "no input is a batch of token numbers; say tokens_per_step"),
        ({"tokens": 1e9, "tokens_per_step": -1}, "tokens_per_step must be a number above zero"),
    ],
)
def test_tokens_that_cannot_be_counted(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        autopar.size_days(Regression(), pairs(), BATCH, **keywords)


def test_an_interruption_gives_the_largest_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sizing._fits

    def stopped(job: Any, what: str) -> Any:
        if what == "layers=8":
            raise KeyboardInterrupt
        return real(job, what)

    monkeypatch.setattr(sizing, "_fits", stopped)
    found = autopar.size_model(stacked, pairs(), optimizer=ADAMW)
    assert found.figures["largest"] == 4 and found.text.startswith("interrupted: layers=4 trains")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.toml").write_text(NODES)
    (tmp_path / "sized_family.py").write_text(
        "import torch\n\n\ndef make(layers=2):\n"
        "    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(layers)))\n"
        "    return model, (torch.ones(4, 32),), lambda outputs, inputs: outputs.square().mean()\n"
    )
    line = ["sized_family.py:make", "--cluster", "pairs.toml"]
    assert main(["size", "nodes", *line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"] == 1
    assert main(["size", "model", *line, "--most", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest"] == 3
    assert main(["size", "model", *line, "--scale", "depth"]) == 2
    assert "must take the keyword depth" in capsys.readouterr().err
    assert main(["size", "days", *line, "--tokens", "1e6", "--tokens-per-step", "64"]) == 0
    assert "1,000,000 tokens take" in capsys.readouterr().out
    assert main(["size", "cost", *line, "--price", "2", "--tokens-per-step", "64", "--save", "plan.json"]) == 0
    assert "A million tokens cost" in capsys.readouterr().out and (tmp_path / "plan.json").is_file()
