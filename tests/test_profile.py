"""autopar profile: what was measured is kept, shown, given as JSON and copied; two real profiles agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import autopar.profile
from autopar.cli import main
from cost_model.cluster import Cluster

MEASURED = """
schema = 1
name = "local-2"
device = "cpu"
num_devices = 2
backend = "gloo"
source = "measured"

[[levels]]
name = "loopback"
start = 0.0
latency = 1e-4
bandwidth = 1e9
efficiency = 1.0
source = "measured"

[[levels.measured]]
kind = "all_reduce"
ranks = 2
points = [[1024, 1e-4], [1048576, 1e-3]]
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that is measured in no time."""
    path = tmp_path / "cache" / "local-2.toml"

    def measured(num_devices: int, *, refresh: bool) -> Cluster:
        assert num_devices == 2 and refresh
        path.parent.mkdir()
        path.write_text(MEASURED, encoding="utf-8")
        return Cluster.load(path)

    monkeypatch.setattr(autopar.profile, "local_cluster", measured)
    monkeypatch.setattr(autopar.profile, "cache_path", lambda num_devices: path)
    return path


def test_json_holds_every_figure(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--num-devices", "2", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    cpu = Cluster.load(kept).devices[0]
    assert tree["path"] == str(kept) and tree["num_devices"] == 2 and tree["peak_flops"] == dict(cpu.peak_flops)
    assert tree["messages"] == [{"kind": "all_reduce", "ranks": 2, "points": [[1024, 1e-4], [1048576, 1e-3]]}]
    assert set(tree["kinds"]) == set(cpu.rows)


def test_text_says_where_it_is_kept_and_a_copy_loads(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mine.toml"
    assert main(["profile", "--num-devices", "2", "--save", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert kept.name in shown and "all_reduce" in shown and "1.05 GB/s" in shown
    assert Cluster.load(copy).fingerprint() == Cluster.load(kept).fingerprint()


@pytest.mark.parametrize("line", [["profile"], ["profile", "--num-devices", "two"]])
def test_a_wrong_line_exits_with_2(line: list[str]) -> None:
    assert main(line) == 2


def test_a_count_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--num-devices", "0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "ConfigError"


@pytest.mark.slow
def test_repeated_profiles_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds a step is made of, within 5 per cent in the median; a busy machine fails this by rights."""
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path))
    first, second = (autopar.profile.profile(2).as_dict() for _ in range(2))
    ratios = []
    for kind, rate in first["kinds"].items():
        name = next(iter(rate))
        ratios.append(abs(second["kinds"][kind][name] / rate[name] - 1.0))
    assert sorted(ratios)[len(ratios) // 2] < 0.05
