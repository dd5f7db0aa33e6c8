"""The worker pool against real processes: replies, failures, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import forked, started_ranks  # noqa: F401  (a fixture)

from autopar.runtime.channel import Channel, Tree, decode, encode
from autopar.runtime.pool import WorkerPool, _gather, _Worker
from cost_model.errors import ClosedError, ConfigError, UnknownNameError, WorkerError

pytestmark = pytest.mark.usefixtures("started_ranks")
TESTS = Path(__file__).resolve().parent
LOST_PEER = "[pair.cc:547] Connection closed by peer [127.0.0.1]:9"
SCRIPT = """
import sys, threading, time
from autopar.runtime.pool import WorkerPool
from cost_model.errors import ClosedError

def start():
    global pool
    pool = WorkerPool(2, target="pool_targets:Target")
    print("started", flush=True)
    if "interrupted" in sys.argv:
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            print("interrupted")
    pool.call("__init__", None)

if "in a thread" in sys.argv:
    starter = threading.Thread(target=start)
    starter.start()
    starter.join()
else:
    start()
print(*[answer["pid"] for answer in pool.call("who")], flush=True)
if "hang" in sys.argv:
    try:
        pool.call("wait_except", 0)
    except KeyboardInterrupt:
        try:
            pool.call("who")
        except ClosedError as error:
            print(error)
        raise
print("end of script")
"""


def start_pool(world_size: int = 2) -> WorkerPool:
    pool = WorkerPool(world_size, target="pool_targets:Target", env={"PYTHONPATH": str(TESTS)})
    pool.call("__init__", {"seed": 7})
    return pool


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with start_pool() as started:
        yield started


@pytest.fixture
def own_pool() -> Iterator[WorkerPool]:
    """For tests of ranks that end, which need not start as others do."""
    with forked(), start_pool() as started:
        yield started


def pids(pool: WorkerPool) -> list[int]:
    return [answer["pid"] for answer in pool.call("who")]


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie that nobody has reaped (where /proc tells)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def all_gone(processes: list[int], within_s: float = 3.0) -> bool:
    deadline = time.monotonic() + within_s
    while any(is_running(pid) for pid in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def run_script(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start SCRIPT as a user would: a plain file, no `__main__` guard, in a folder of its own."""
    file = folder / "script.py"
    file.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(file), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def press_control_c(script: subprocess.Popen[str]) -> None:
    """Send what a terminal sends: SIGINT to the whole process group."""
    os.killpg(script.pid, signal.SIGINT)


def first_ranks(script: subprocess.Popen[str]) -> list[int]:
    """Wait until its ranks hang in a collective (almost), and return their process ids."""
    assert script.stdout is not None
    assert script.stdout.readline() == "started\n"
    processes = [int(word) for word in script.stdout.readline().split()]
    time.sleep(0.3)
    assert len(processes) == 2 and all(is_running(pid) for pid in processes)
    return processes


def same(left: Tree, right: Tree) -> bool:
    """Equal types, values and bits; shapes, strides and dtypes of tensors."""
    if isinstance(left, torch.Tensor):
        return (left.dtype, left.shape, left.stride()) == (
            right.dtype,
            right.shape,
            right.stride(),
        ) and left.contiguous().flatten().view(torch.uint8).equal(right.contiguous().flatten().view(torch.uint8))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


TREES: dict[str, Tree] = {
    "scalars": (None, True, 1, -(2**70), 0.1, float("inf"), "ß\n\ud800", ""),
    "containers": {"a": [1, (2, [3.0])], 4: {}, None: (), True: []},
    "dtypes": tuple(
        torch.arange(6).to(dtype).reshape(2, 3)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    ),
    "nan bits": torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32),
    "shapes": (torch.tensor(3.5), torch.empty(0, 4), torch.ones(1, 1, dtype=torch.complex64)),
    "strides": (torch.arange(12.0).reshape(3, 4).t(), torch.ones(3, 1).expand(3, 1)),
    "large": torch.arange(700_000, dtype=torch.float64),
}


@pytest.mark.parametrize("name", TREES)
def test_payloads_come_back_bit_equal_from_every_rank(pool: WorkerPool, name: str) -> None:
    for returned in pool.call("echo", (TREES[name],)):
        assert same(returned, (TREES[name],))


def test_each_rank_gets_its_item_of_a_list(pool: WorkerPool) -> None:
    batch = torch.randn(8, 1024)
    assert all(same(*pair) for pair in zip(pool.call("echo", list(batch.chunk(2))), batch.chunk(2), strict=True))


def test_ranks_are_one_process_group(pool: WorkerPool) -> None:
    sums = pool.call("sum", [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert [total.tolist() for total in sums] == [[11.0, 22.0], [11.0, 22.0]]


def test_ranks_are_set_up_as_documented(pool: WorkerPool) -> None:
    answers = pool.call("who")
    assert [answer["rank"] for answer in answers] == [0, 1]
    for answer in answers:
        assert (answer["world_size"], answer["payload"], answer["threads"]) == (2, {"seed": 7}, 1)
        assert (answer["keeps"], answer["secret"]) == (True, None)


def test_round_trip_of_a_batch_costs_little(pool: WorkerPool) -> None:
    batch = {"input_ids": torch.zeros(8, 1024, dtype=torch.int64), "labels": torch.zeros(8, 1024, dtype=torch.int64)}
    times_s = []
    for _ in range(50):
        start = time.perf_counter()
        pool.call("sink", batch)
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 5e-3


def test_what_cannot_travel_is_refused_and_nothing_is_sent(pool: WorkerPool) -> None:
    with pytest.raises(ConfigError, match=r"rank 1\[1\]\['mask'\] is a numpy.ndarray"):
        pool.call("echo", [{}, {"mask": np.ones(2)}])
    with pytest.raises(ConfigError, match="3 payloads for 2 ranks"):
        pool.call("echo", [1, 2, 3])
    assert pool.call("echo", 5) == [5, 5]


def test_the_end_of_a_fork_leaves_the_ranks_to_their_owner(pool: WorkerPool) -> None:
    child = os.fork()
    if child == 0:
        pool._finalizer()
        os._exit(int(pool._crew.workers[0].channel.fileno() == -1))
    assert os.waitpid(child, 0)[1] == 0
    assert pool.call("echo", 1) == [1, 1]


def test_tied_tensors_stay_tied_and_slices_travel_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))
    frame = bytearray(
        b"".join(encode({"a": weight, "b": weight, "t": weight.t(), "row": weight[3], "col": weight[:, 3]}))
    )
    back = decode(frame)
    assert back["a"].data_ptr() == back["b"].data_ptr() == back["t"].data_ptr() != back["row"].data_ptr()
    assert same(back["row"], weight.detach()[3]) and back["col"].equal(weight.detach()[:, 3])
    assert back["row"].untyped_storage().nbytes() == back["col"].untyped_storage().nbytes() == 64 * 4
    assert len(frame) < 64 * 64 * 4 + 2048


@pytest.mark.parametrize("value", [np.float64(1.0), np.int64(1), torch.float32, torch.ones(2, device="meta"), {1}])
def test_unknown_values_are_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError, match=r"payload\['x'\]\[0\] is a .*cannot be sent"):
        encode({"x": (value,)})


def test_an_exception_names_its_rank_and_shows_its_traceback(own_pool: WorkerPool) -> None:
    processes = pids(own_pool)
    with pytest.raises(WorkerError, match="rank 1 raised ValueError: no such batch") as caught:
        own_pool.call("fail_on", 1)
    assert (caught.value.rank, caught.value.exit_code) == (1, None)
    assert 'raise ValueError("no such batch")' in caught.value.worker_traceback
    assert all_gone(processes)
    with pytest.raises(ClosedError, match="rank 1 raised ValueError: no such batch"):
        own_pool.call("who")


def test_a_killed_rank_is_named_while_the_other_waits_for_it(own_pool: WorkerPool) -> None:
    processes = pids(own_pool)
    killer = threading.Timer(0.5, os.kill, (processes[1], signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 was killed by signal 9") as caught:
        own_pool.call("wait_except", 1)
    assert time.monotonic() - start < 0.5 + 2.0
    assert (caught.value.rank, caught.value.exit_code) == (1, -signal.SIGKILL)
    assert all_gone(processes) and own_pool.closed


def test_an_exit_is_an_error_with_the_last_words(own_pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 0 exited with code 3") as caught:
        own_pool.call("exit_on", 0)
    assert (caught.value.rank, caught.value.exit_code) == (0, 3)
    assert caught.value.worker_traceback.endswith("last words\n")


def test_a_rank_that_does_not_answer_shows_where_it_stands(own_pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="did not answer 'stall' in time") as caught:
        own_pool.call("stall", timeout_s=0.5)
    assert "in stall" in caught.value.worker_traceback


def test_a_target_that_cannot_be_imported_is_an_error_of_the_first_message() -> None:
    with WorkerPool(1, target="no_such_module:Target") as pool:
        with pytest.raises(WorkerError, match="rank 0 raised ModuleNotFoundError"):
            pool.call("__init__", None)


def test_a_rank_that_cannot_start_is_an_error_with_its_output(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(2, b'no room')\nos._exit(9)\n")
    with WorkerPool(2, env={"PYTHONPATH": str(tmp_path)}) as pool:
        with pytest.raises(WorkerError, match=r"exited with code 9 .*\n.*\nno room"):
            pool.wait_ready()


def test_close_lets_the_ranks_leave_and_may_be_repeated() -> None:
    pool = start_pool()
    processes = pids(pool)
    pool.close()
    assert not any(is_running(pid) for pid in processes)
    assert [worker.process.returncode for worker in pool._crew.workers] == [0, 0], "they were killed"
    pool.close()
    with pytest.raises(ClosedError, match="compile again"):
        pool.call("who")


def test_a_forgotten_pool_leaves_nothing() -> None:
    pool = start_pool(1)
    processes = pids(pool)
    del pool
    assert all_gone(processes)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"world_size": 0}, ConfigError, "at least 1"),
        ({"world_size": 1, "backend": "glo"}, UnknownNameError, "did you mean 'gloo'"),
        ({"world_size": 1, "target": "module.Class"}, ConfigError, "package.module:ClassName"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Tree], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        WorkerPool(**arguments)


def test_a_script_without_a_main_guard_works_and_leaves_nothing(tmp_path: Path) -> None:
    with run_script(tmp_path) as script:
        output, errors = script.communicate(timeout=60)
    assert script.returncode == 0, errors
    _, numbers, end = output.splitlines()
    assert end == "end of script" and len(numbers.split()) == 2
    assert all_gone([int(number) for number in numbers.split()])


@pytest.mark.parametrize("where", ["in the main thread", "in a thread"])
def test_ranks_die_with_a_killed_parent_even_inside_a_collective(tmp_path: Path, where: str) -> None:
    with run_script(tmp_path, "hang", where) as script:
        processes = first_ranks(script)
        script.kill()
        assert all_gone(processes)


def test_control_c_stops_the_ranks_and_reaches_the_caller(tmp_path: Path) -> None:
    with run_script(tmp_path, "hang") as script:
        processes = first_ranks(script)
        press_control_c(script)
        output, errors = script.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors and "the worker pool is closed: a call was interrupted" in output
    assert all_gone(processes)


def test_control_c_between_calls_leaves_starting_ranks_alone(tmp_path: Path) -> None:
    with run_script(tmp_path, "interrupted") as script:
        assert script.stdout is not None and script.stdout.readline() == "started\n"
        time.sleep(0.3)
        press_control_c(script)
        output, errors = script.communicate(timeout=60)
    assert script.returncode == 0, errors
    assert output.splitlines()[0] == "interrupted"


class StagedRank:
    """A rank of which only the replies and the end matter: what it says is staged by the test."""

    def __init__(self, rank: int) -> None:
        ours, self._theirs = socket.socketpair()
        process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        self.worker = _Worker(rank, process, tempfile.TemporaryFile(), Channel(ours))

    def say(self, *reply: Tree) -> None:
        Channel(self._theirs).send(encode(reply))

    def dispose(self) -> None:
        self.worker.process.kill()
        self.worker.process.wait()
        self.worker.log.close()
        self.worker.channel.close()
        self._theirs.close()


@pytest.fixture
def staged() -> Iterator[list[StagedRank]]:
    ranks = [StagedRank(rank) for rank in range(3)]
    yield ranks
    for rank in ranks:
        rank.dispose()


def gather_error(staged: list[StagedRank]) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        _gather([rank.worker for rank in staged], "it", float("inf"))
    return caught.value


def test_who_failed_by_itself_is_named_before_who_lost_it(staged: list[StagedRank]) -> None:
    staged[0].say("error", "RuntimeError", LOST_PEER, "")
    cause = threading.Timer(0.2, staged[2].say, ("error", "ValueError", "bad", ""))
    cause.start()
    assert gather_error(staged).rank == 2


def test_a_lost_peer_is_reported_when_nobody_else_fails(staged: list[StagedRank]) -> None:
    staged[0].say("ok", None)
    staged[1].say("error", "RuntimeError", LOST_PEER, "")
    assert gather_error(staged).rank == 1


def test_a_rank_that_dies_after_its_reply_still_counts(staged: list[StagedRank]) -> None:
    staged[1].say("ok", None)
    staged[1].worker.process.kill()
    assert gather_error(staged).exit_code == -signal.SIGKILL
