"""Estimated against measured steps on slow networks of one machine (namespaces, ``slow_network.py``), over gloo.

    python benchmarks/slow_plans.py [--nodes 3] [--rates 10 50 200] [--delays 0 5 20] [--compare] [--wire bf16]
    python benchmarks/slow_plans.py --link 0 1 10 50 --link 1 0 200 2 --width 256 --layers 9 --batch 1024

A pipeline of one stage a node, under GPipe and 1F1B, in 1, 2 and 4 microbatches, and under 1F1B in windows. --compare:
the automatic plan against data parallelism and ZeRO 3 instead. --link: from a node to another, a rate and a delay of
their own, the same in all networks. Products are priced as this machine is measured
(``Cluster.local``), with as many ranks at once as it has cores; under --compare, where all compute at once, with all.
Needs root.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import socket
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slow_network import HEADER_BYTES, MTU_BYTES, Links, SlowNetwork, why_not

import autopar
from autopar.calibrate import cache_path, usable_cores

RANK_FILE = Path(__file__).resolve().parent / "slow_rank.py"
_TCP_BYTES = 52  # headers of IP and TCP with time stamps
# Of a link that is busy both ways: a full packet, and the acknowledgement of one that goes the other way.
_PAYLOAD = (MTU_BYTES - _TCP_BYTES) / (MTU_BYTES + HEADER_BYTES + _TCP_BYTES + HEADER_BYTES)
# What a transfer and a collective cost two processes that are waiting for it.
_CLUSTER = """\
schema = 1
name = "slow"
backend = "gloo"
source = "slow_network.py"
shared_egress = true

[transport]
start = "0.5 ms"
efficiency = {payload}
source = "headers of Ethernet, IP and TCP"

[between]
{between}
"""
_NODE = """
[[nodes]]
region = "{region}"
{device}
"""
_LINK = """
[[links]]
regions = ["{source}", "{target}"]
one_way = true
{link}
"""


class SlowRanks:
    """One rank on each node of a network; answers to what all are told come from rank 0 unless one failed."""

    def __init__(self, network: SlowNetwork) -> None:
        port = _free_port()
        self.network = network
        self.ranks = [
            network.start(
                node,
                [sys.executable, str(RANK_FILE)],
                {
                    "RANK": str(node),
                    "WORLD_SIZE": str(network.nodes),
                    "MASTER_ADDR": network.address(0),
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                },
            )
            for node in range(network.nodes)
        ]
        for rank in self.ranks:
            _line(rank)

    def tell(self, told: Mapping[str, Any]) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(told) + "\n")
            rank.stdin.flush()

    def answers(self) -> list[dict[str, Any]]:
        return [_line(rank) for rank in self.ranks]


def _line(rank: Any) -> dict[str, Any]:
    line = rank.stdout.readline()
    if not line:
        return {"error": "Ended", "message": f"with code {rank.wait()}"}
    found: dict[str, Any] = json.loads(line)
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def cluster_text(nodes: int, bits_per_s: float, delay_s: float, device: str, others: Links | None = None) -> str:
    """The network's own settings as a cluster file; a region for each node, so that pairs may have their own links."""
    parts = [_CLUSTER.format(payload=_PAYLOAD, between=_link(bits_per_s, delay_s))]
    parts += [_NODE.format(region=f"node {node}", device=device) for node in range(nodes)]
    for (source, target), link in (others or {}).items():
        parts.append(_LINK.format(source=f"node {source}", target=f"node {target}", link=_link(*link)))
    return "".join(parts)


def _link(bits_per_s: float, delay_s: float) -> str:
    return f'latency = {delay_s + 2e-4}\nbandwidth = {bits_per_s / 8}\nsource = "slow_network.py"'


def measured_device(ranks: int) -> str:
    """This machine's device with so many ranks at once, as tables of a node."""
    autopar.Cluster.local(ranks)
    device = re.search(
        r"^\[device\].*?(?=^\[\[)", cache_path(ranks).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert device is not None
    return re.sub(r"^\[device", "[nodes.device", device.group(), flags=re.MULTILINE)


def plans() -> Iterator[dict[str, Any]]:
    for schedule, count in itertools.product(("gpipe", "1f1b"), (1, 2, 4)):
        yield {"schedule": schedule, "microbatches": count, "window": None if schedule == "gpipe" else 1}
    for window in (1, 2, 4):
        yield {"schedule": "1f1b", "microbatches": 8, "window": window}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cores = max(1, round(usable_cores()))
    others = {(int(a), int(b)): (mbit * 1e6, ms * 1e-3) for a, b, mbit, ms in options.link}
    device = measured_device(options.nodes if options.compare else min(options.nodes, cores))
    with SlowNetwork(options.nodes) as network, tempfile.TemporaryDirectory() as folder:
        ranks = SlowRanks(network)
        for mbit, ms in itertools.product(options.rates, options.delays):
            network.shape(mbit * 1e6, ms * 1e-3, others)
            path = Path(folder) / f"{mbit}-{ms}.toml"
            path.write_text(cluster_text(options.nodes, mbit * 1e6, ms * 1e-3, device, others))
            layers = options.layers or 2 * options.nodes
            told = {"cluster": str(path), "width": options.width, "layers": layers, "steps": options.steps}
            for name, pins, batch in _cases(options):
                ranks.tell({**told, "batch": batch, "pins": pins, "precision": {"wire": options.wire}})
                yield {"rate": mbit, "delay": ms, "plan": name, **ranks.answers()[0]}


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], int]]:
    nodes, batch = options.nodes, options.batch
    if options.compare:
        yield "automatic", {}, batch * nodes
        yield "data parallel", {"dp": nodes, "tp": 1, "pp": 1, "zero": 0}, batch * nodes
        yield "ZeRO 3", {"dp": nodes, "tp": 1, "pp": 1, "zero": 3}, batch * nodes
        return
    for plan in plans():
        pins = {"dp": 1, "tp": 1, "pp": nodes, "schedule": plan["schedule"], "window": plan["window"]}
        yield (
            f"{plan['schedule']} x{plan['microbatches']}{_window(plan['window'])}",
            {**pins, "microbatch_size": batch // plan["microbatches"]},
            batch,
        )


def _window(window: int | None) -> str:
    return "" if window in (None, 1) else f", window {window}"


def show(row: Mapping[str, Any]) -> float | None:
    head = f"{row['rate']:5g} Mbit/s {row['delay']:4g} ms  {row['plan']:18}"
    if "error" in row:
        print(f"{head} {row['error']}: {row['message']}", flush=True)
        return None
    measured = statistics.median(row["steps_s"])
    error = row["estimate_s"] / measured - 1
    print(
        f"{head} measured {measured:7.3f} s  estimated {row['estimate_s']:7.3f} s {error:+7.1%}  {row['plan_found']}",
        flush=True,
    )
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rates", nargs="*", type=float, default=[10, 50, 200], help="Mbit/s")
    parser.add_argument("--delays", nargs="*", type=float, default=[0, 5, 20], help="ms")
    parser.add_argument(
        "--link", nargs=4, type=float, action="append", default=[], metavar=("FROM", "TO", "RATE", "DELAY")
    )
    parser.add_argument("--width", type=int, default=512, help="of each layer")
    parser.add_argument("--layers", type=int, help="two a node where left out")
    parser.add_argument("--batch", type=int, default=256, help="samples; under --compare of each node")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--wire", choices=["bf16", "fp16", "auto"], help="what stages send each other")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if reason := why_not():
        print(f"no slow networks on this machine: {reason}")
        return 1
    errors = []
    for row in rows(options):
        if options.json:
            print(json.dumps(row), flush=True)
        elif (error := show(row)) is not None:
            errors.append(abs(error))
    if errors:
        print(f"mean error {statistics.fmean(errors):.1%}, largest {max(errors):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
