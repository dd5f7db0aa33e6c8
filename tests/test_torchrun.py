"""Under torchrun every rank runs the same script: same loss, same errors, and a dead rank ends the job."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import example_gpt
from parity import SGD, largest_error, reference
from processes import all_gone, descendants
from regression import BATCH, Regression

import autopar

TESTS = Path(__file__).resolve().parent
TIMEOUT_S = 120.0


def finish(
    mode: str, folder: Path, restarts: int = 0, timeout_s: float = TIMEOUT_S, *, ranks: int = 2, monitor_s: float = 0.1
) -> tuple[int, str]:
    """torchrun --nproc-per-node RANKS launched.py MODE FOLDER: exit code and output; it must leave no process.

    On a port of its own, so that other jobs may run beside it. monitor_s: how soon the launcher ends the other ranks of
    one that is gone.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", str(monitor_s)]
    paths = os.pathsep.join((str(TESTS.parent), str(TESTS), str(TESTS.parent / "examples")))
    with (folder / "output.txt").open("w") as output:
        job = subprocess.Popen(
            [*launcher, str(TESTS / "launched.py"), mode, str(folder)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    started = _watch(job, timeout_s)
    text = (folder / "output.txt").read_text()
    assert len(started) >= ranks and all_gone(started), text
    return job.returncode, text


def _watch(job: subprocess.Popen[bytes], timeout_s: float) -> list[int]:
    """Every process that a job started; those of a job that does not end are killed."""
    started: list[int] = []
    deadline = time.monotonic() + timeout_s
    while job.poll() is None:
        started += [pid for pid in descendants(job.pid) if pid not in started]
        time.sleep(0.1)
        if time.monotonic() > deadline:
            for pid in (job.pid, *started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return started


def seen_by_ranks(folder: Path, ranks: int = 2) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def test_both_ranks_train_what_one_device_trains(tmp_path: Path) -> None:
    code, output = finish("trains", tmp_path)
    assert code == 0, output
    assert [f"rank {rank} left with" in output for rank in range(2)] == [True, True]
    assert output.count("thread(s), 0 of gloo") == 2, output
    losses, trained = reference(Regression(), BATCH, SGD)
    for rank, seen in enumerate(seen_by_ranks(tmp_path)):
        assert seen["first"]["losses"] == pytest.approx(losses, rel=1e-5)
        assert seen["second"] == pytest.approx(losses, rel=1e-5)
        assert largest_error(seen["first"]["state"], trained.state_dict()) < 1e-5
        assert largest_error(seen["model"], Regression().state_dict()) == 0, "the script's own model is left as it was"
        assert (seen["first"]["is_main"], seen["left_by_close"], seen["kept_by_close"]) == (rank == 0, True, True)
    one, two = seen_by_ranks(tmp_path)
    assert all(torch.equal(one["first"]["state"][name], tensor) for name, tensor in two["first"]["state"].items())
    assert [one["first"][name] for name in ("losses", "plan", "notes")] == [
        two["first"][name] for name in ("losses", "plan", "notes")
    ]
    assert autopar.Plan.from_json(one["first"]["plan"]).tp == 2


@pytest.mark.slow
def test_every_rank_gets_the_same_error_and_may_go_on_until_one_ends_the_job(tmp_path: Path) -> None:
    code, output = finish("refuses", tmp_path)
    assert code != 0
    assert "InfeasiblePlanError: no plan fits under 1.0 KiB per device; the smallest cap that would do is" in output
    one, two = seen_by_ranks(tmp_path)
    assert one == two
    types = {name: error["type"] for name, error in one.items() if name != "step"}
    assert types == {
        "world size": "WorldSizeError",
        "world size, lazily": "WorldSizeError",
        "pins": "ParallelismError",
        "cap": "InfeasiblePlanError",
        "weights": "ConfigError",
        "batch": "ConfigError",
        "batch after a checkpoint": "ConfigError",
        "rate": "ConfigError",
        "batch to evaluate": "ConfigError",
        "shape to evaluate": "ConfigError",
        "shapes": "BatchError",
    }
    assert (one["world size"]["world_size"], one["world size"]["num_devices"]) == (2, 3)
    assert one["cap"]["cap_bytes"] == 1024 < one["cap"]["needed_bytes"] and one["cap"]["tensors"]
    assert (
        "rank 1 has another model than rank 0 ('up.weight' differs); call torch.manual_seed"
        in one["weights"]["message"]
    )
    for what in ("batch", "batch after a checkpoint", "batch to evaluate", "shape to evaluate"):
        assert "rank 1 has another batch than rank 0 ('x' differs); pass the same global" in one[what]["message"], what
    assert (
        "rank 1 has another optimizer than rank 0 ('lr of group 0' differs); change exe.opt" in one["rate"]["message"]
    )
    assert one["step"] == pytest.approx(reference(Regression(), BATCH, SGD)[0][0], rel=1e-5)


OTHERS = [
    pytest.param(f"dies:{how}", "Signal 9 (SIGKILL)", marks=pytest.mark.slow)
    for how in ("pp:step", "tp:step", "zero:step", "dp:save")
]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("fails", "RuntimeError: the user's own error on one rank"), *OTHERS],
)
def test_a_rank_that_is_gone_ends_the_job(tmp_path: Path, mode: str, reason: str) -> None:
    """The others say whom they miss, whether or not the launcher ends them: on other nodes it may be late."""
    code, output = finish(mode, tmp_path, monitor_s=3.0)
    assert code != 0 and reason in output
    assert "LostRankError: rank 0 has lost rank 1, which has ended or is cut off" in output, output


@pytest.mark.slow
def test_profilers_see_the_segments_and_the_names_of_the_estimate_under_every_schedule(tmp_path: Path) -> None:
    code, output = finish("profiles", tmp_path)
    assert code == 0, output
    one, two = seen_by_ranks(tmp_path)
    assert one.keys() == {"1f1b", "zero_bubble", "interleaved"}
    for schedule in one:
        assert [seen[schedule]["unseen"] for seen in (one, two)] == [set(), set()], schedule
        assert "blocks.0" in one[schedule]["labels"] and "blocks.3" in two[schedule]["labels"]
        titles = one[schedule]["titles"] | two[schedule]["titles"]
        assert any(title.startswith("weight ") for title in titles) == (schedule == "zero_bubble")


@pytest.mark.slow
def test_every_rank_loads_the_samples_of_its_replica_alone(tmp_path: Path) -> None:
    """torch's sampler deals samples out one by one, so that the replicas together have those of one global batch."""
    code, output = finish("loads", tmp_path, ranks=4, monitor_s=3.0)
    assert code != 0
    assert "BatchError: batch input 'x' is float32[3, 8] but the plan is for float32[4, 8]; have the Data" in output
    assert "rank 0 has lost rank 1" in output or "rank 0 has lost another rank" in output, output
    values, model = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0)), Regression()
    optimizer, losses = SGD(model.parameters()), []
    for epoch in range(2):
        for rows in torch.randperm(24, generator=torch.Generator().manual_seed(3 + epoch)).split(8):
            optimizer.zero_grad()
            loss = model(*values[:, rows])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    for seen in seen_by_ranks(tmp_path, 4):
        for plan, replicas in {"dp": 4, "dp x pp": 2, "dp x tp": 2}.items():
            assert seen[plan]["losses"] == pytest.approx(losses, rel=1e-5), plan
            assert (seen[plan]["replicas"], seen[plan]["loaded"]) == (replicas, 2 * 24 // replicas)


@pytest.mark.slow
def test_hooks_of_some_ranks_and_what_hooks_raise(tmp_path: Path) -> None:
    code, output = finish("hooks", tmp_path, monitor_s=3.0)
    assert code != 0 and "RuntimeError: the hook of rank 1 at step 5" in output
    assert "LostRankError: rank 0 has lost rank 1" in output
    for rank, seen in enumerate(seen_by_ranks(tmp_path)):
        assert seen["told"] == [f"the hook of rank {rank} at step {step}" for step in (2, 3)]
        assert seen["steps"] == 4 and len(seen["scales"]) == (0 if rank else 12)
        assert all(own == told for own, told in zip(seen["scales"][::3], seen["scales"][1::3], strict=True))


@pytest.mark.slow
def test_training_features_on_every_rank(tmp_path: Path) -> None:
    code, output = finish("uses", tmp_path)
    assert code == 0, output
    model = Regression()
    optimizer = SGD(model.parameters())
    losses, norms = [], []
    for batches, max_norm in ((1, 0.5), (2, 0.25), (1, 0.5)):
        optimizer.zero_grad()
        for _ in range(batches):
            loss = model(**BATCH)
            (loss / batches).backward()
            losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
    for seen in seen_by_ranks(tmp_path):
        assert seen["losses"] == pytest.approx([*losses, losses[3], losses[3]], rel=1e-5)
        assert seen["norms"] == pytest.approx(norms[:2], rel=1e-5)
        assert (seen["extra"], seen["steps"]) == ({"epoch": 3}, 3)
        assert seen["unnamed"] == set(), "torch.profiler shows what the estimate has, and each segment of the model"
    assert [path.name for path in tmp_path.glob("trace*.json")] == ["trace0.json"]
    check_own_rows(seen_by_ranks(tmp_path))


def labelled() -> tuple[Any, dict[str, Any]]:
    """As in launched.py, which cannot be imported here."""
    model, batch = example_gpt(n_layer=1)
    batch["targets"][:3, 2:] = -100
    return model, batch


def check_own_rows(ranks: list[dict[str, Any]]) -> None:
    """Ranks that load the samples of their replica train what one device trains on all of them.

    The labels, which are counted over the whole batch, are gathered; shards of one replica must be given the same.
    """
    model, batch = labelled()
    expected, _ = reference(model, batch, SGD)
    for rank, seen in enumerate(ranks):
        assert seen["place"] == (1 - rank, 2) and seen["tp"]["place"] == (0, 1)
        assert seen["local"] == pytest.approx(expected, rel=1e-5) and seen["tp"]["local"] == pytest.approx(
            expected, rel=1e-5
        )
        assert (seen["gathers"], seen["tp"]["gathers"]) == (1, 0)
        assert max(*seen["forward_error"], *seen["tp"]["forward_error"]) < 1e-5
        assert "int64[8, 16] but the plan is for int64[4, 16]" in seen["errors"][0]["message"]
        assert "rank 1 has another batch than rank 0 ('idx' differs)" in seen["tp"]["errors"][0]["message"]


def check_curve(folder: Path) -> None:
    """Every step was taken, those before a death perhaps twice, and always with the loss of a run that never died."""
    lines = [line.split() for line in (folder / "losses.txt").read_text().splitlines()]
    taken = [(int(step), float(loss)) for step, loss in lines]
    model, batch = Regression().double(), {name: tensor.double() for name, tensor in BATCH.items()}
    optimizer = SGD(model.parameters())
    rates = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.8)
    for step in range(max(8, *(number + 1 for number, _ in taken))):
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        rates.step()
        found = {loss for number, loss in taken if number == step}
        assert len(found) == 1 and found.pop() == pytest.approx(float(loss.detach()), rel=1e-9), (step, taken)
    repeated = [one for one, following in zip(taken, taken[1:], strict=False) if following[0] <= one[0]]
    assert all(one[0] - following[0] < 2 for one, following in zip(taken, taken[1:], strict=False)), repeated


@pytest.mark.slow
def test_a_job_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    """Rank 0 is killed while it writes the second one."""
    code, output = finish("resumes:dp:0:write_data", tmp_path, restarts=1)
    assert code == 0 and "exitcode: -9" in output, output
    check_curve(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["forward", "backward", "reduce_gradients", "update_parameters", "save"])
def test_a_job_goes_on_wherever_a_rank_is_killed(tmp_path: Path, rank: int, when: str) -> None:
    code, output = finish(f"resumes:dp:{rank}:{when}", tmp_path, restarts=1)
    assert code == 0, output
    check_curve(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("plan", "deaths"), [("dp", 20), ("pp", 4), ("tp", 4), ("zero", 4)])
def test_a_job_goes_on_after_deaths_at_random_moments(tmp_path: Path, plan: str, deaths: int) -> None:
    """Whatever the ranks were doing: forward, backward, transfers, gathers, reduction, update, or saving."""
    code, output = finish(f"resumes:{plan}:0:{deaths}", tmp_path, restarts=deaths, timeout_s=1000)
    assert code == 0, output
    assert len(list(tmp_path.glob("death*"))) == deaths
    check_curve(tmp_path)
