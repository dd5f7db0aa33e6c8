"""Real slow networks on this machine: as slow as they say, and steps as long as estimated."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import slow_network  # noqa: E402
from slow_plans import SlowRanks, cluster_text  # noqa: E402

sys.path.remove(str(FOLDER))
REASON = slow_network.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no slow networks here: {REASON}")

SINK = r"""
import socket
with socket.create_server(("", 5000)) as listener:
    print("up", flush=True)
    peer, _ = listener.accept()
    print(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).strip(b"\0").decode(), flush=True)
    while head := peer.recv(8, socket.MSG_WAITALL):
        left = int.from_bytes(head, "big")
        while left:
            left -= len(peer.recv(min(left, 1 << 20)))
        peer.sendall(b"k")
"""
KNOCK = r"""
import socket, sys
try:
    socket.create_connection((sys.argv[1], 5000), timeout=1.0)
except OSError as error:
    print(type(error).__name__)
"""
SOURCE = r"""
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 5000))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).strip(b"\0").decode(), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    peer.sendall(int(line).to_bytes(8, "big") + b"x" * int(line))
    peer.recv(1)
    print(time.perf_counter() - start, flush=True)
"""


def asked(process: Any, line: object) -> str:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return str(process.stdout.readline())


def test_a_network_is_as_slow_as_it_says_and_leaves_nothing() -> None:
    with slow_network.SlowNetwork(2) as network:
        sink = network.start(0, [sys.executable, "-c", SINK], {})
        assert sink.stdout is not None and sink.stdout.readline() == "up\n"
        source = network.start(1, [sys.executable, "-c", SOURCE, network.address(0)], {})
        assert source.stdout is not None and source.stdout.readline() == sink.stdout.readline() == "reno\n"
        for bits_per_s, delay_s, nbytes in (
            (50e6, 0.0, 10**6),
            (20e6, 0.03, 10**5),
            (20e6, 0.03, 1),
            (1e6, 0.0, 16000),
            (200e6, 0.0, 10**6),
        ):
            network.shape(bits_per_s, delay_s)
            check_exchange(source, nbytes, nbytes * 8 / bits_per_s + 2 * delay_s)
        network.shape(50e6, 0.01, {(1, 0): (10e6, 0.03)})
        check_exchange(source, 10**6, 0.8 + 0.03 + 0.01)
        assert slow_network.namespaces_of(os.getpid())
    assert not slow_network.namespaces_of(os.getpid())
    assert sink.poll() is not None and source.poll() is not None


def relayed(network: Any) -> set[str]:
    """The nodes whose packets pass the relay, as the kernel has it."""
    command = ["ip", "netns", "exec", network.namespace("middle"), "ip", "rule"]
    return set(re.findall(r"iif (to\d)", subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def knocked(network: Any, source: int, target: int) -> str:
    """What comes of a connection where nobody listens: a refusal is an answer."""
    process = network.start(source, [sys.executable, "-c", KNOCK, network.address(target)], {})
    return str(process.communicate()[0]).strip()


def test_fast_links_pass_no_relay_unless_they_delay_or_one_of_them_dies() -> None:
    with slow_network.SlowNetwork(3) as network:
        for shape, expected in (
            ((200e6, 0.0), set()),
            ((200e6, 0.0, {(1, 0): (300e6, 0.0)}), {"to1"}),
            ((200e6, 0.005), {"to0", "to1", "to2"}),
            ((20e6, 0.0), {"to0", "to1", "to2"}),
            ((200e6, 0.0), set()),
        ):
            network.shape(*shape)
            assert relayed(network) == expected
        assert [knocked(network, 0, node) for node in (1, 2)] == ["ConnectionRefusedError"] * 2
        network.cut_way(0, 2)
        assert relayed(network) == {"to0"}
        assert [knocked(network, 0, node) for node in (1, 2)] == ["ConnectionRefusedError", "TimeoutError"]


def check_exchange(source: Any, nbytes: int, expected_s: float) -> None:
    """A message that follows a pause, and one byte in reply; no byte of it is free, but for what a fast link's bucket
    holds, which is less than headers take of a large message."""
    asked(source, nbytes)
    seconds = min(float(asked(source, nbytes)) for _ in range(3))
    assert expected_s <= seconds <= 1.2 * expected_s + 0.02, (seconds, expected_s, nbytes)


OWNER = f"""
import sys, time
sys.path.insert(0, {str(FOLDER)!r})
from slow_network import SlowNetwork
with SlowNetwork(2) as network:
    network.start(0, ["sleep", "1000"], {{}})
    print("up", flush=True)
    time.sleep(1000)
"""


def test_what_a_killed_owner_left_goes_at_the_next_start() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "up\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert len(slow_network.namespaces_of(owner.pid)) == 3
    with slow_network.SlowNetwork(1):
        assert not slow_network.namespaces_of(owner.pid)


def told(folder: Path, nodes: int, **others: Any) -> dict[str, Any]:
    path = folder / "slow.toml"
    path.write_text(cluster_text(nodes, 20e6, 0.005, 'device = "cpu"'))
    pins = {"dp": 1, "tp": 1, "pp": nodes, "schedule": "gpipe", "microbatch_size": 64}
    return {"cluster": str(path), "width": 512, "layers": 2 * nodes, "batch": 256, "pins": pins, "steps": 2, **others}


def answers_of_cut(
    folder: Path, nodes: int, cut: Callable[[slow_network.SlowNetwork], None], **others: Any
) -> list[dict[str, Any]]:
    """What ranks answer once links are cut within some step."""
    with slow_network.SlowNetwork(nodes) as network:
        network.shape(20e6, 0.005)
        ranks = SlowRanks(network)
        ranks.tell(told(folder, nodes, steps=1000, timeout_s=6, announced=True, **others))
        assert ranks.answers() == [{"running": True}] * nodes
        time.sleep(1)  # into some step
        begin = time.monotonic()
        cut(network)
        answers: list[dict[str, Any]] = ranks.answers()
        assert time.monotonic() - begin < 60
    return answers


@pytest.mark.slow
def test_steps_take_as_long_as_estimated(tmp_path: Path) -> None:
    with slow_network.SlowNetwork(3) as network:
        network.shape(20e6, 0.005)
        ranks = SlowRanks(network)
        ranks.tell(told(tmp_path, 3))
        found = ranks.answers()[0]
    assert "error" not in found, found
    # Tests may share the machine: a process that waits for a core is late for every message.
    assert 0.65 * min(found["steps_s"]) <= found["estimate_s"] <= 1.15 * max(found["steps_s"])


def measured(folder: Path, nodes: int, *cases: dict[str, Any]) -> list[tuple[float, float]]:
    """Of each case, the fastest step and the estimate."""
    with slow_network.SlowNetwork(nodes) as network:
        network.shape(50e6, 0.02)
        ranks, found = SlowRanks(network), []
        for case in cases:
            what = told(folder, nodes, **case)
            Path(what["cluster"]).write_text(cluster_text(nodes, 50e6, 0.02, 'device = "cpu"'))
            ranks.tell(what)
            answer = ranks.answers()[0]
            assert "error" not in answer, answer
            found.append((min(answer["steps_s"]), answer["estimate_s"]))
    return found


@pytest.mark.slow
def test_a_window_hides_a_real_delay(tmp_path: Path) -> None:
    pins = {"dp": 1, "tp": 1, "pp": 2, "schedule": "1f1b", "microbatch_size": 16}
    found = measured(tmp_path, 2, *({"pins": {**pins, "window": window}} for window in (1, 4)))
    (narrow_s, narrow_estimate_s), (wide_s, wide_estimate_s) = found
    assert narrow_estimate_s > 2 * wide_estimate_s and narrow_s > 1.5 * wide_s


@pytest.mark.slow
def test_the_automatic_plan_against_data_parallelism_and_zero_3(tmp_path: Path) -> None:
    """At least twice as fast where the estimate says so, as it does here."""
    even = {"dp": 2, "tp": 1, "pp": 1}
    cases: tuple[dict[str, Any], ...] = ({}, {**even, "zero": 0}, {**even, "zero": 3})
    (own_s, own_estimate_s), *others = measured(tmp_path, 2, *({"pins": pins} for pins in cases))
    for seconds, estimate_s in others:
        assert estimate_s > 2 * own_estimate_s and seconds > 2 * own_s


@pytest.mark.slow
@pytest.mark.parametrize(
    "pins",
    [{}, {"pins": {"dp": 2, "tp": 1, "pp": 1, "zero": 0}}, {"pins": {"dp": 2, "tp": 1, "pp": 1, "zero": 3}}],
    ids=["activations", "gradients", "parameters"],
)
def test_a_link_that_dies_is_named_within_the_timeout(tmp_path: Path, pins: dict[str, Any]) -> None:
    """Whatever it carries nearly all the time."""
    answers = answers_of_cut(tmp_path, 2, lambda network: network.cut(1), **pins)
    assert all(answer["error"] == "CollectiveTimeoutError" for answer in answers), json.dumps(answers)
    assert sorted(answer["message"].split(", which")[0] for answer in answers) == [
        "rank 0 waited 6 s for rank 1",
        "rank 1 waited 6 s for rank 0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("way", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "pins", [{}, {"pins": {"dp": 2, "tp": 1, "pp": 1, "zero": 0}}], ids=["activations", "gradients"]
)
def test_a_link_that_dies_one_way_is_named_within_the_timeout(
    tmp_path: Path, pins: dict[str, Any], way: tuple[int, int]
) -> None:
    """Nothing is acknowledged then: who still sends waits for the other, too."""
    answers = answers_of_cut(tmp_path, 2, lambda network: network.cut_way(*way), **pins)
    named = [re.match(r"rank (\d) (waited 6 s for|has lost) rank (\d)", answer["message"]) for answer in answers]
    assert all(named), json.dumps(answers)
    assert [match[1] + match[3] for match in named if match] == ["01", "10"]


@pytest.mark.slow
def test_a_link_that_dies_while_three_gather_parameters_is_named(tmp_path: Path) -> None:
    pins = {"dp": 3, "tp": 1, "pp": 1, "zero": 3}
    answers = answers_of_cut(tmp_path, 3, lambda network: network.cut(1), batch=255, pins=pins)
    named = [re.match(r"rank (\d) (waited 6 s for|has lost) rank (\d)", answer["message"]) for answer in answers]
    assert all(named), json.dumps(answers)
    assert {match[1] + match[3] for match in named if match} & {"01", "21"}
