"""Slow networks on one machine: a network namespace for each node, joined by veth pairs through one in the middle.

What a node sends passes ``tc tbf`` on its own interface, which limits its rate, and then a relay in user space, which
is the link: the middle routes it into a TUN device, each packet takes as long as its bytes do at the link's rate, one
after the other, and what the relay writes back a delay later goes on to its node. That stands in for netem, which not
every kernel has, and makes up for what a token bucket holds, which passes at once after every pause: no link does that.
Nor does a link take a share of a core, as the relay does of many packets. Where a node's links are fast, all alike and
without a delay, the bucket alone is the link, and holds two packets.
Everything goes when the context ends, when its process dies (the relay and what runs on nodes die with it), or at the
next start (namespaces of dead processes are found by their names).

Connections are controlled by losses alone, of which there are none, whatever the machine's own control is. BBR, the
default of some, paces what is sent by how fast acknowledgements come back: where these waited behind messages the other
way, one of 0.22 s took 0.57.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Link = tuple[float, float]
"""Bits per second, and the delay one way in seconds."""
Links = Mapping[tuple[int, int], Link]
"""Of sender and receiver."""
PREFIX = "autopar-slow"
DEVICE = "eth0"
MTU_BYTES = 8000
HEADER_BYTES = 14  # of Ethernet
_QUEUE = "64mb"  # of tbf: nothing is dropped, so that rates are what they say
_AT_FIRST = (1e9, 0.0)
_BUCKET_FRAMES = 16  # so that the relay, which may come late to a packet, is late for none
_LINK_FRAMES = 2  # so that what the kernel sends a little late does not slow the rest
_FAST_BITS_PER_S = 100e6  # two packets in about a millisecond
_RELAYED = ("lookup", "100", "priority", "100")
_ROUTE = ("initcwnd", "400", "initrwnd", "400", "congctl", "reno")  # as connections that have sent for long
_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001  # linux/if_tun.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SETTINGS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
}


def why_not() -> str | None:
    """What keeps this machine from having slow networks, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    missing = [name for name in ("ip", "tc", "sysctl") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)} here"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no access to /dev/net/tun"
    name = f"{PREFIX}-{os.getpid()}-try"
    tried = _quiet("ip", "netns", "add", name)
    if tried.returncode:
        return f"ip netns add: {tried.stderr.decode().strip()}"
    limited = _quiet("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", *_tbf(1e6))
    _quiet("ip", "netns", "del", name)
    return f"tc tbf: {limited.stderr.decode().strip()}" if limited.returncode else None


class SlowNetwork:
    """So many nodes, each with one address, on a network that may change while it is used."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._name = f"{PREFIX}-{os.getpid()}"
        self._relay: subprocess.Popen[str] | None = None
        self._links: dict[tuple[int, int], Link] = {}
        self._relayed: set[int] = set()
        self._started: list[subprocess.Popen[str]] = []
        self._on_end: Any = None

    def __enter__(self) -> SlowNetwork:
        remove_left_over()
        if threading.current_thread() is threading.main_thread():
            self._on_end = signal.signal(signal.SIGTERM, _leave)
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._started, *([self._relay] if self._relay else [])]:
            process.kill()
            process.wait()
        for node in (*range(self.nodes), "middle"):
            remove(self.namespace(node))
        if self._on_end is not None:
            signal.signal(signal.SIGTERM, self._on_end)

    def namespace(self, node: int | str) -> str:
        return f"{self._name}-{node}"

    def address(self, node: int) -> str:
        return f"10.213.{node}.2"

    def shape(self, bits_per_s: float, delay_s: float, others: Links | None = None) -> None:
        """From now on every node sends at this rate with this delay, but for pairs (sender, receiver) with links of
        their own. All that a node sends over equal links shares their rate."""
        pairs = itertools.permutations(range(self.nodes), 2)
        self._links = {pair: (others or {}).get(pair, (bits_per_s, delay_s)) for pair in pairs}
        self._tell()
        for node in range(self.nodes):
            self._limit(node)

    def cut(self, node: int) -> None:
        """The node's link dies: nothing leaves or reaches it, and nobody is told."""
        self._in("middle", "ip", "link", "set", f"to{node}", "down")

    def cut_way(self, source: int, target: int) -> None:
        """One way of a link dies: nothing that one node sends the other arrives any more, and nobody is told."""
        del self._links[source, target]
        self._tell()
        self._limit(source)

    def _limit(self, node: int) -> None:
        """The rate of what a node sends, and the way it takes."""
        found = [link for (source, _), link in self._links.items() if source == node]
        links = dict.fromkeys(found)
        is_plain = len(links) == 1 and len(found) == self.nodes - 1
        is_relayed = not (is_plain and found[0][0] >= _FAST_BITS_PER_S and found[0][1] == 0.0)
        if is_relayed != (node in self._relayed):
            self._in("middle", "ip", "rule", "add" if is_relayed else "del", "iif", f"to{node}", *_RELAYED)
            self._relayed ^= {node}
        if links:
            frames = _BUCKET_FRAMES if is_relayed else _LINK_FRAMES
            limit = _tbf(sum(rate for rate, _ in links), frames)
            self._in(node, "tc", "qdisc", "replace", "dev", DEVICE, "root", *limit)

    def _tell(self) -> None:
        """The relay carries nothing between pairs that it is told no link of."""
        relay = self._relay
        assert relay is not None and relay.stdin is not None
        relay.stdin.write(json.dumps([[*pair, *link] for pair, link in self._links.items()]) + "\n")
        relay.stdin.flush()

    def start(self, node: int, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """A process on a node, which dies with this one. Its input and output are pipes of text."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace(node), *command],
            env={**os.environ, **environment, "GLOO_SOCKET_IFNAME": DEVICE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=_die_with_parent,
        )
        self._started.append(process)
        return process

    def _build(self) -> None:
        self._relayed.clear()
        for node in (*range(self.nodes), "middle"):
            _run("ip", "netns", "add", self.namespace(node))
            self._in(node, "ip", "link", "set", "lo", "up")
            self._in(node, "sysctl", "-q", "-w", *(f"{key.replace('/', '.')}={v}" for key, v in _SETTINGS.items()))
        for node in range(self.nodes):
            self._join(node)
        self._start_relay()
        self.shape(*_AT_FIRST)

    def _join(self, node: int) -> None:
        inner, outer = self.namespace(node), self.namespace("middle")
        _run("ip", "link", "add", DEVICE, "netns", inner, "type", "veth", "peer", "name", f"to{node}", "netns", outer)
        for where, device, last in ((node, DEVICE, 2), ("middle", f"to{node}", 1)):
            self._in(where, "ip", "addr", "add", f"10.213.{node}.{last}/24", "dev", device)
            self._in(where, "ip", "link", "set", device, "mtu", str(MTU_BYTES), "up")
        self._in(node, "ip", "route", "add", "default", "via", f"10.213.{node}.1", *_ROUTE)

    def _start_relay(self) -> None:
        self._in("middle", "ip", "tuntap", "add", "dev", "delay0", "mode", "tun")
        self._in("middle", "ip", "link", "set", "delay0", "mtu", str(MTU_BYTES), "txqueuelen", "10000", "up")
        self._in("middle", "ip", "route", "add", "default", "dev", "delay0", "table", "100")
        self._relay = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace("middle"), sys.executable, __file__, "relay"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=_die_with_parent,
        )
        assert self._relay.stdout is not None
        self._relay.stdout.readline()  # once it listens

    def _in(self, node: int | str, *command: str) -> None:
        _run("ip", "netns", "exec", self.namespace(node), *command)


def remove_left_over() -> None:
    """Namespaces of processes that are gone."""
    for name in _quiet("ip", "netns", "list").stdout.decode().splitlines():
        name = name.split()[0] if name.strip() else ""
        if name.startswith(f"{PREFIX}-") and not Path(f"/proc/{name.split('-')[2]}").exists():
            remove(name)


def remove(namespace: str) -> None:
    """A namespace, with whatever still runs in it."""
    for pid in _quiet("ip", "netns", "pids", namespace).stdout.decode().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _quiet("ip", "netns", "del", namespace)


def namespaces_of(pid: int) -> list[str]:
    """Names of the namespaces that a process made and that are still there."""
    names = (line.split()[0] for line in _quiet("ip", "netns", "list").stdout.decode().splitlines() if line.strip())
    return [name for name in names if name.startswith(f"{PREFIX}-{pid}-")]


def _tbf(bits_per_s: float, frames: int = _BUCKET_FRAMES) -> list[str]:
    burst = frames * (MTU_BYTES + HEADER_BYTES)
    return ["tbf", "rate", f"{bits_per_s:.0f}bit", "burst", str(burst), "limit", _QUEUE]


def _run(*command: str) -> None:
    done = _quiet(*command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode().strip()}")


def _quiet(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, check=False)


def _leave(number: int, _: object) -> None:
    """Ends the process by way of what tidies up."""
    raise SystemExit(128 + number)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


# --- The relay, a process of its own in the middle


class _Relay:
    """Packets that wait for their time, by (due, arrival).

    links: of sender and receiver, bits per second and seconds. free_s: when all has left that a node was given to send
    over a link.
    """

    def __init__(self, tun: IO[bytes]) -> None:
        self.tun, self.count = tun, 0
        self.links: dict[tuple[int, int], Link] = {}
        self.free_s: dict[tuple[int, Link], float] = {}
        self.waiting: list[tuple[float, int, bytes]] = []

    def told(self, line: str) -> None:
        self.links = {(source, target): (rate, delay_s) for source, target, rate, delay_s in json.loads(line)}

    def take(self) -> None:
        """Everything that has come; the third number of an address is its node."""
        for packet in _packets(self.tun.fileno()):
            source, target = packet[14], packet[18]
            link = self.links.get((source, target))
            if link is None:  # not between two nodes
                continue
            rate, delay_s = link
            starts = max(time.monotonic(), self.free_s.get((source, link), 0.0))
            left = self.free_s[source, link] = starts + (len(packet) + HEADER_BYTES) * 8 / rate
            self.count += 1
            heapq.heappush(self.waiting, (left + delay_s, self.count, packet))

    def give(self) -> float | None:
        """Send on what is due; seconds until the next packet is."""
        while self.waiting:
            rest = self.waiting[0][0] - time.monotonic()
            if rest > 0:
                return rest
            with contextlib.suppress(OSError):  # its node is gone, or cut off
                os.write(self.tun.fileno(), heapq.heappop(self.waiting)[2])
        return None


def _packets(descriptor: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        while True:
            packet = os.read(descriptor, 65536)
            if packet[0] >> 4 == 4:
                yield packet


def _relay() -> None:
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    with open("/dev/net/tun", "r+b", buffering=0) as tun:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", b"delay0", _IFF_TUN_NO_PI))
        os.set_blocking(tun.fileno(), False)
        relay, rest = _Relay(tun), None
        print("listening", flush=True)
        while True:
            ready, _, _ = select.select([tun, sys.stdin], [], [], rest)
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                relay.told(line)
            relay.take()
            rest = relay.give()


if __name__ == "__main__":
    _relay()
