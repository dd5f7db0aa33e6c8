"""Faults in worker mode: what fails is named, nothing works on afterwards, and no process is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked_ranks import workers
from models import example_gpt
from parity import SGD, cpu_cluster, reference
from processes import all_gone, descendants
from regression import BATCH, TWO, Regression

import autopar
from cost_model.errors import ClosedError, WorkerError

TESTS = Path(__file__).resolve().parent
SCRIPT = """
import sys
import autopar
from parity import SGD, cpu_cluster
from regression import BATCH, Regression

exe = autopar.compile(Regression(), cpu_cluster(2), BATCH, optimizer=SGD)
print(exe.step(BATCH), flush=True)
sys.stdin.readline()
if sys.argv[1] == "raises":
    raise RuntimeError("the user's own error")
while sys.argv[1] == "steps":
    exe.step(BATCH)
print("end of script")
"""


def test_a_killed_worker_is_named_soon_and_closes_the_executable() -> None:
    before = workers()
    with autopar.compile(Regression(), TWO, BATCH, optimizer=SGD) as exe:
        exe.step(BATCH)
        started = [pid for pid in workers() if pid not in before]
        assert len(started) == 2
        threading.Timer(0.3, os.kill, (started[1], signal.SIGKILL)).start()
        begin = time.monotonic()
        with pytest.raises(WorkerError, match=r"rank 1 was killed by signal 9 .*compile again") as caught:
            while time.monotonic() < begin + 30.0:
                exe.step(BATCH)
        assert time.monotonic() < begin + 0.3 + 5.0
        assert (caught.value.rank, caught.value.exit_code) == (1, -signal.SIGKILL)
        assert all_gone(started)
        for use in (lambda: exe.step(BATCH), exe.full_state_dict):
            with pytest.raises(ClosedError, match="rank 1 was killed by signal 9.*compile again"):
                use()


@pytest.mark.slow
@pytest.mark.parametrize("pins", [{"dp": 2}, {"tp": 2}, {"pp": 2, "microbatch_size": 2}], ids=str)
def test_a_worker_killed_at_any_moment_is_named_soon(pins: dict[str, int]) -> None:
    """In forward, backward, transfers, reduction or update, as it comes; never the rank that only lost it."""
    model, batch = example_gpt()
    draw = random.Random(str(pins))
    for _ in range(7):
        victim, before = draw.randrange(2), workers()
        parallelism = autopar.Parallelism(**pins)
        with autopar.compile(model, cpu_cluster(2), batch, optimizer=SGD, parallelism=parallelism) as exe:
            exe.step(batch)
            started = [pid for pid in workers() if pid not in before]
            delay_s = draw.uniform(0.0, 0.2)
            threading.Timer(delay_s, os.kill, (started[victim], signal.SIGKILL)).start()
            begin = time.monotonic()
            with pytest.raises(WorkerError, match=rf"^rank {victim} was killed by signal 9"):
                while time.monotonic() < begin + 30.0:
                    exe.step(batch)
            assert time.monotonic() < begin + delay_s + 5.0
            assert all_gone(started)


@pytest.mark.slow
def test_a_worker_killed_while_checkpoints_are_written_leaves_the_last_whole_one(tmp_path: Path) -> None:
    before, losses = workers(), []
    with autopar.compile(Regression(), TWO, BATCH, optimizer=SGD) as exe:
        losses.append(exe.step(BATCH))
        exe.save(tmp_path)
        started = [pid for pid in workers() if pid not in before]
        threading.Timer(0.2, os.kill, (started[0], signal.SIGKILL)).start()
        begin = time.monotonic()
        with pytest.raises(WorkerError, match=r"rank 0 was killed by signal 9"):
            while time.monotonic() < begin + 30.0:
                losses.append(exe.step(BATCH))
                exe.save(tmp_path)
    with autopar.compile(Regression(), TWO, BATCH, optimizer=SGD, parallelism=autopar.Parallelism(pp=2)) as exe:
        exe.load(tmp_path)
        loss = exe.step(BATCH)
        assert 1 <= exe.steps - 1 <= len(losses)
    expected, _ = reference(Regression(), BATCH, SGD, len(losses) + 1)
    assert losses == pytest.approx(expected[:-1], rel=1e-4, abs=1e-7)
    assert loss == pytest.approx(expected[exe.steps - 1], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("pins", [pytest.param({"dp": 2}, marks=pytest.mark.slow), {"pp": 2}], ids=str)
def test_a_stuck_worker_ends_the_step_after_the_timeout(pins: dict[str, int]) -> None:
    before = workers()
    parallelism = autopar.Parallelism(**pins)
    with autopar.compile(Regression(), TWO, BATCH, optimizer=SGD, parallelism=parallelism, timeout_s=2) as exe:
        exe.step(BATCH)
        started = [pid for pid in workers() if pid not in before]
        os.kill(started[1], signal.SIGSTOP)
        with pytest.raises(WorkerError, match=r"rank 0 raised CollectiveTimeoutError: rank 0 waited 2 s for rank 1"):
            exe.step(BATCH)
        assert all_gone(started)


@pytest.mark.parametrize("pins", [{"dp": 2}, pytest.param({"pp": 2}, marks=pytest.mark.slow)], ids=str)
def test_an_error_in_generated_code_shows_the_line(pins: dict[str, int]) -> None:
    model, batch = example_gpt(n_layer=1, tied=False)
    wrong = {**batch, "idx": batch["idx"].clone()}
    wrong["idx"][7, 3] = 64
    parallelism = autopar.Parallelism(**pins)
    with autopar.compile(model, cpu_cluster(2), batch, optimizer=SGD, parallelism=parallelism) as exe:
        exe.step(batch)
        with pytest.raises(WorkerError, match="IndexError: index out of range") as caught:
            exe.step(wrong)
        with pytest.raises(ClosedError):
            exe.step(batch)
        program = [line.strip() for line in exe.code(caught.value.rank).splitlines()]
    assert caught.value.rank == (1 if "dp" in pins else 0)
    _, _, tail = caught.value.worker_traceback.rpartition('File "<autopar program>"')
    shown = tail.splitlines()[1].strip()
    assert "embedding" in shown and shown in program


def run_script(folder: Path, mode: str) -> subprocess.Popen[str]:
    """A plain file without a `__main__` guard, in a session of its own."""
    file = folder / "script.py"
    file.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(file), mode],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def after_the_first_step(script: subprocess.Popen[str]) -> list[int]:
    """The script's ranks once they have trained a step; the script goes on."""
    assert script.stdout is not None and script.stdin is not None
    assert float(script.stdout.readline()) > 0
    ranks = descendants(script.pid)
    assert len(ranks) == 2
    script.stdin.write("go on\n")
    script.stdin.flush()
    return ranks


@pytest.mark.slow  # tests/test_pool.py has a script whose pool nobody closes
@pytest.mark.parametrize(
    ("mode", "code", "last"), [("ends", 0, "end of script"), ("raises", 1, "the user's own error")]
)
def test_a_script_that_never_closes_leaves_nothing(tmp_path: Path, mode: str, code: int, last: str) -> None:
    with run_script(tmp_path, mode) as script:
        ranks = after_the_first_step(script)
        output, errors = script.communicate(timeout=60)
    assert script.returncode == code, errors
    assert (output if code == 0 else errors).strip().endswith(last)
    assert all_gone(ranks)


@pytest.mark.slow  # tests/test_pool.py kills and interrupts scripts whose ranks hang in a collective
def test_a_killed_script_takes_its_ranks_along(tmp_path: Path) -> None:
    with run_script(tmp_path, "steps") as script:
        ranks = after_the_first_step(script)
        time.sleep(0.3)
        script.kill()
        assert all_gone(ranks)


@pytest.mark.slow
def test_control_c_during_a_step_leaves_nothing(tmp_path: Path) -> None:
    with run_script(tmp_path, "steps") as script:
        ranks = after_the_first_step(script)
        time.sleep(0.3)
        os.killpg(script.pid, signal.SIGINT)
        _, errors = script.communicate(timeout=60)
    assert script.returncode != 0 and "KeyboardInterrupt" in errors
    assert all_gone(ranks)
