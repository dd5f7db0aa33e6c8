"""The command line: the same figures as the library, one clear message for a mistake, only JSON with --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shared_ranks import shared_ranks  # noqa: F401  (a fixture)

import autopar
from autopar.cli import loaded, main
from cost_model.plan import Plan

ROOT = Path(__file__).resolve().parents[1]

MODEL = '''
"""A model of the user's own, with a helper beside it."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, idx, targets=None):
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def factory():
    from sizes_beside import BATCH

    print("building")
    idx = torch.zeros(BATCH, 16, dtype=torch.int64)
    return Tagger(), {"idx": idx, "targets": idx}


def on_meta():
    with torch.device("meta"):
        return factory()


def with_loss():
    model, batch = factory()
    inputs = {"idx": batch["idx"]}
    return model, inputs, lambda outputs, inputs: F.cross_entropy(outputs.flatten(0, 1), inputs["idx"].flatten())


def with_argument(size):
    return factory()


def only_a_model():
    return Tagger()


def no_module():
    return "Tagger", {}


def odd_inputs():
    return Tagger(), [1, 2]


def broken():
    raise RuntimeError("the user's own mistake")


number = 3
'''
CLUSTER = """
schema = 1
name = "bench"
device = "cpu"
num_devices = 2
backend = "gloo"
source = "made up"

[[levels]]
name = "loopback"
start = "10 us"
latency = "5 us"
bandwidth = "4 GB/s"
efficiency = 1.0
source = "made up"
"""
USERS_MODULES = ("tagger", "sizes_beside", "zoo", "autopar_model_tagger", "autopar_model_json")
SHIPPED = ("--cluster", "dgx2-v100-32gb", "--num-devices", "2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a user: a model file, what it imports, a package and a cluster file."""
    (tmp_path / "tagger.py").write_text(MODEL)
    (tmp_path / "sizes_beside.py").write_text("BATCH = 8\n")
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").touch()
    (tmp_path / "zoo" / "tagger.py").write_text(MODEL)
    (tmp_path / "zoo" / "lost.py").write_text("import no_such_library_here\n")
    (tmp_path / "bench.toml").write_text(CLUSTER)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in USERS_MODULES]:
        del sys.modules[name]


def tree_of(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    """What a command that must succeed prints with --json: JSON alone, whatever the user's code prints."""
    assert main([*line, "--json"]) == 0
    shown = capsys.readouterr()
    tree = json.loads(shown.out)
    assert "building" in shown.err
    assert isinstance(tree, dict)
    return tree


def error_of(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[str, str]:
    """(type, message) of a command that must fail, which both outputs tell."""
    assert main([*line, "--json"]) == 2
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert f"autopar: {told['message']}" in shown.err and "Traceback" not in shown.err
    return told["error"], told["message"]


# --- Commands


def test_plan_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tagger.py:factory", *SHIPPED, "--tp", "2"]) == 0
    shown = capsys.readouterr().out
    assert "dp=1 x tp=2 x pp=1, batch 8" in shown
    assert "blocks.0..2" in shown and "Parameters on the tp axis" in shown and "Memory of each device" in shown


def test_estimate_is_the_librarys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tree_of(capsys, "estimate", "tagger.py:on_meta", *SHIPPED, "--pp", "2", "--microbatch-size", "2")
    cluster = autopar.Cluster.load("dgx2-v100-32gb", num_devices=2)
    with loaded("tagger.py:factory") as user:
        pins = autopar.Parallelism(pp=2, microbatch_size=2)
        found = autopar.estimate(user.model, cluster, user.inputs, parallelism=pins)
    assert (tree["step_time_s"], tree["peak_bytes"]) == (found.step_time_s, found.peak_bytes)
    assert (tree["plan"]["pp"], tree["plan"]["microbatches"]) == (2, 4)
    assert main(["estimate", "tagger.py:on_meta", *SHIPPED]) == 0
    assert "Step time on the rank that finishes last" in capsys.readouterr().out


def test_a_saved_plan_is_used_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tree_of(capsys, "plan", "tagger.py:factory", *SHIPPED, "--dp", "2", "--save", "a.json")
    assert Plan.from_json(json.dumps(tree["plan"])) == Plan.load("a.json")
    again = tree_of(capsys, "plan", "tagger.py:factory", *SHIPPED, "--plan", "a.json", "--save", "b.json")
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    assert again["step_time_s"] == tree["step_time_s"]
    assert "the plan was given, not searched" in again["notes"]


@pytest.mark.parametrize(("solver", "row"), [("columns", "one_column_1:"), ("flat", "one_range_1:")])
def test_the_integer_program_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], solver: str, row: str
) -> None:
    line = ("plan", "tagger.py:factory", *SHIPPED, "--pp", "2", "--solver", solver, "--write-lp", "stages.lp")
    assert tree_of(capsys, *line)["plan"]["pp"] == 2
    assert f"\n{row}" in (folder / "stages.lp").read_text()


def test_a_model_in_a_package_with_a_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tree_of(capsys, "estimate", "zoo.tagger:with_loss", *SHIPPED)
    assert tree["step_time_s"] > 0 and tree["plan"]["batch"] == 8


@pytest.mark.usefixtures("shared_ranks")
def test_compare_on_real_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("compare", "tagger.py:factory", "--cluster", "bench.toml", "--dp", "2", "--steps", "2")
    tree = tree_of(capsys, *line)
    assert len(tree["steps_s"]) == 2 and 0.0 <= tree["peak_memory_error"] <= 0.10
    assert main([*line, "--save", "ran.json"]) == 0
    assert "estimated" in capsys.readouterr().out and Plan.load("ran.json").dp == 2


def test_explain_lays_the_kinds_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tree_of(capsys, "explain", "tagger.py:factory", *SHIPPED, "--pp", "2", "--points", "2")
    kinds = {row["kind"]: row for row in tree["candidates"]}
    assert list(kinds) == [
        "as asked", "automatic", "data parallel", "ZeRO-3", "tensor parallel", "pipeline", "Megatron grid",
        "without a memory cap",
    ]  # fmt: skip
    degrees = {kind: tuple(kinds[kind]["plan"][name] for name in ("dp", "tp", "pp")) for kind in kinds}
    assert degrees["data parallel"] == (2, 1, 1) and degrees["tensor parallel"] == (1, 2, 1)
    assert degrees["pipeline"] == degrees["as asked"] == (1, 1, 2)
    assert kinds["automatic"]["slowdown"] == 0.0
    assert kinds["as asked"]["plan"] == tree["chosen"] == kinds["pipeline"]["plan"]
    assert sum(tree["shares"].values()) == pytest.approx(1.0)
    assert list(tree["shares"].values()) == sorted(tree["shares"].values(), reverse=True)
    assert tree["cap_cost"] == 0.0 and tree["binds"][1].endswith("the cap costs no time.")
    assert kinds["data parallel"]["plan"]["zero"] == 0 and kinds["ZeRO-3"]["plan"]["zero"] == 3
    assert [point["cap_bytes"] for point in tree["curve"]] == sorted(point["cap_bytes"] for point in tree["curve"])
    assert len(tree["curve"]) == 2 and tree["curve"][-1]["step_time_s"] <= tree["chosen"]["step_time_s"]
    assert max(tree["savings"], key=tree["savings"].get) in ("computing", "nvswitch")


@pytest.mark.slow
def test_explain_says_what_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate = ("estimate", "tagger.py:factory", *SHIPPED)
    least = ("--microbatch-size", "1", "--recompute", "full", "--zero", "3")
    kinds = {"data parallel": "--dp", "tensor parallel": "--tp", "pipeline": "--pp"}
    cap = str(min(tree_of(capsys, *estimate, pin, "2", *least)["peak_bytes"] for pin in kinds.values()))
    tree = tree_of(capsys, "explain", "tagger.py:factory", *SHIPPED, "--memory-cap", cap, "--points", "0")
    parallel = next(row for row in tree["candidates"] if row["kind"] in kinds and row["plan"] is None)
    assert parallel["plan"] is None and parallel["needed_bytes"] > int(cap) >= tree["chosen"]["peak_bytes"]
    assert "does not fit under" in parallel["reason"]
    assert main(["explain", "tagger.py:factory", *SHIPPED, "--memory-cap", cap, "--points", "0"]) == 0
    shown = capsys.readouterr().out
    assert "needs " in shown and "automatic" in shown and "computing" in shown


def test_explain_gives_reasons_for_what_is_impossible(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("explain", "tagger.py:factory", "--cluster", "dgx2-v100-32gb", "--num-devices", "16", "--points", "0")
    tree = tree_of(capsys, *line, "--microbatch-size", "2")
    parallel = next(row for row in tree["candidates"] if row["kind"] == "data parallel")
    assert parallel["plan"] is None and "does not divide" in parallel["reason"]


def test_one_device_has_one_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("explain", "tagger.py:factory", "--cluster", "dgx2-v100-32gb", "--num-devices", "1", "--points", "0")
    assert [row["kind"] for row in tree_of(capsys, *line)["candidates"]] == ["automatic", "without a memory cap"]


# --- Mistakes


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (
            ("plan", "nowhere.py:factory", *SHIPPED),
            "ConfigError",
            "there is no file 'nowhere.py'; MODEL is path.py:fac",
        ),
        (("plan", "tagger.py", *SHIPPED), "ConfigError", "cannot read 'tagger.py'; MODEL is path.py:factory"),
        (("plan", "tagger.py:", *SHIPPED), "ConfigError", "cannot read 'tagger.py:'"),
        (("plan", "tagger.py:factry", *SHIPPED), "UnknownNameError", "did you mean 'factory'?"),
        (("plan", "nowhere.model:factory", *SHIPPED), "ConfigError", "there is no module 'nowhere'"),
        (("plan", "zoo.model:factory", *SHIPPED), "ConfigError", "there is no module 'zoo.model'"),
        (("plan", "tagger.py:number", *SHIPPED), "ConfigError", "is int, not a function"),
        (("plan", "tagger.py:with_argument", *SHIPPED), "ConfigError", "must take no arguments"),
        (("plan", "tagger.py:only_a_model", *SHIPPED), "ConfigError", "returned Tagger; return (model, inputs)"),
        (("plan", "tagger.py:no_module", *SHIPPED), "ConfigError", "returned str as its model"),
        (("plan", "tagger.py:odd_inputs", *SHIPPED), "ConfigError", "returned list as its inputs"),
        (
            ("plan", "tagger.py:factory", "--cluster", "dgx2-v100-32g"),
            "UnknownNameError",
            "did you mean 'dgx2-v100-32gb'",
        ),
        (("plan", "tagger.py:factory", "--cluster", "no.toml"), "ConfigError", "cannot read the hardware file"),
        (("plan", "tagger.py:factory", "--cluster", "local"), "ConfigError", "add --num-devices 2"),
        (("plan", "tagger.py:factory", *SHIPPED, "--dp", "3"), "ParallelismError", "dp=3"),
        (("plan", "tagger.py:factory", *SHIPPED, "--schedule", "wave"), "ParallelismError", "schedule must be one of"),
        (("plan", "tagger.py:factory", *SHIPPED, "--memory-cap", "3 bags"), "ConfigError", "unknown unit 'bags'"),
        (
            ("plan", "tagger.py:factory", *SHIPPED, "--tp", "2", "--microbatch-size", "8", "--memory-cap", "1KiB"),
            "InfeasiblePlanError",
            "the smallest cap",
        ),
        (("plan", "tagger.py:factory", *SHIPPED, "--plan", "no.json"), "ConfigError", "cannot read the plan 'no.json'"),
        (
            ("plan", "tagger.py:factory", *SHIPPED, "--plan", "bench.toml"),
            "ConfigError",
            "'bench.toml': not an autopar plan",
        ),
        (("plan", "tagger.py:factory", *SHIPPED, "--save", "no/a.json"), "ConfigError", "its folder does not exist"),
        (("plan", "tagger.py:factory", *SHIPPED, "--write-lp", "no/a.lp"), "ConfigError", "its folder does not exist"),
        (("plan", "tagger.py:factory", *SHIPPED, "--solver", "flatt"), "UnknownNameError", "did you mean 'flat'"),
        (("compare", "tagger.py:factory", "--cluster", "bench.toml", "--steps", "0"), "ConfigError", "steps must be"),
        (("compare", "tagger.py:on_meta", "--cluster", "bench.toml"), "BatchError", "on the meta device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], line: tuple[str, ...], kind: str, message: str
) -> None:
    found = error_of(capsys, *line)
    assert found[0] == kind and message in found[1]


def test_a_plan_for_another_cluster_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree_of(capsys, "plan", "tagger.py:factory", *SHIPPED, "--save", "a.json")
    line = ("plan", "tagger.py:factory", "--cluster", "dgx2-v100-32gb", "--num-devices", "4", "--plan", "a.json")
    assert error_of(capsys, *line)[0] == "PlanMismatchError"


def test_the_users_own_errors_are_left_alone(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        main(["plan", "tagger.py:broken", *SHIPPED])
    with pytest.raises(ModuleNotFoundError, match="no_such_library_here"):
        main(["plan", "zoo.lost:factory", *SHIPPED])


@pytest.mark.parametrize(
    "line", [["plan", "tagger.py:factory"], ["pln", "tagger.py:factory"], ["plan", "--depth", "3"]]
)
def test_a_wrong_line_exits_with_2(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "help" in shown.err
    assert main([*line, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "UsageError"


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("estimate", "plan", "compare", "explain"):
        assert command in shown
        assert main([command, "--help"]) == 0
        options = capsys.readouterr().out
        assert all(option in options for option in ("MODEL", "--cluster", "--microbatch-size", "--save", "--json"))


# --- The user's files


def test_the_users_folder_is_importable_only_meanwhile(folder: Path) -> None:
    before = list(sys.path)
    with loaded("tagger.py:factory") as user:
        assert sys.path[0] == str(folder.resolve())
        assert user.inputs["idx"].shape == (8, 16) and user.loss_fn is None
    assert sys.path == before
    with loaded(f"{folder}/zoo/tagger.py:with_loss") as user:
        assert sys.path[0] == str(folder.resolve() / "zoo")
        assert callable(user.loss_fn)


def test_a_file_named_as_a_loaded_module_does_not_replace_it(folder: Path) -> None:
    (folder / "json.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(2, 2), {}\n")
    with loaded("json.py:make") as user:
        assert user.inputs == {}
    assert sys.modules["json"] is json


COMMAND = [sys.executable, "-m", "autopar.cli", "plan", "tagger.py:factory", "--json", *SHIPPED]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_an_error_of_a_process_is_one_message(folder: Path) -> None:
    """Only JSON on standard output, whatever the user's code prints."""
    line = [*COMMAND, "--pp", "5"]
    done = subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "ParallelismError"
    assert "building" in done.stderr and "Traceback" not in done.stderr and "autopar: pp=5" in done.stderr


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(COMMAND, cwd=folder, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "BrokenPipe" not in process.stderr.read()
        assert process.wait(timeout=120) == 0
