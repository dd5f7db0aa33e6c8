"""Hardware of the reference tables: the shipped files, with the constants that rows may fix put in by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from cost_model.axis_groups import axis_groups
from cost_model.cluster import Cluster, Level
from cost_model.collectives import Link
from cost_model.device import GEMM_KINDS, Device
from cost_model.device_rows import GemmRow, Row, StreamRow
from cost_model.network import Network
from cost_model.prices import BlockPrice, ChunkPrice, StagePrice
from cost_model.program import Block, Collective, OpCost, Program, StageProgram
from cost_model.simulate import step_time_s


@dataclass(frozen=True)
class Constant:
    """low, high: what is physically possible; why: what says so."""

    name: str
    low: float
    high: float
    why: str


MATMUL = "matmul efficiency"
STREAM = "share of memory bandwidth"
OVERHEAD = "overhead of a kernel (s)"
BANDWIDTH = "link bandwidth (bytes/s)"
START = "start of a collective (s)"
LINK = "share of link bandwidth"
COPY = "rate of copying messages (bytes/s)"
NIC = "share of an instance's bandwidth"
NIC_SHIPPED = 0.545  # of cost_model/clusters/dtfm-case1.toml
OFFLOAD = "host's seconds a parameter"
OFFLOADED = "optimizer on the host"  # as the name of an op whose bytes are parameters
CALL = "host's seconds a call"
CALLED = "calls of the host"  # as the name of an op whose bytes are calls
HOSTED = {OFFLOAD: OFFLOADED, CALL: CALLED}
FIRST = "speed of the first node among equal ones"


def shipped(cluster: Cluster, names: tuple[str, ...], level: int = 0, dtype: str = "float16") -> dict[str, float]:
    """The values of constants in a cluster's files."""
    device, matmul = cluster.devices[-1], cluster.devices[-1].rows["matmul"]
    assert isinstance(matmul, GemmRow)
    values: dict[str, Callable[[], float]] = {
        MATMUL: lambda: matmul.rate_share(dtype),
        STREAM: lambda: _share(device),
        OVERHEAD: lambda: device.op_overhead_s,
        BANDWIDTH: lambda: cluster.levels[level].link.bandwidth_bytes_per_s,
        START: lambda: cluster.levels[level].start_s,
        LINK: lambda: cluster.levels[level].efficiency,
        COPY: lambda: 1.0 / network_of(cluster).copy_s_per_byte,
        NIC: lambda: NIC_SHIPPED,
        OFFLOAD: lambda: 1.0 / device.ops[OFFLOADED].points[0][1],
        CALL: lambda: 1.0 / device.ops[CALLED].points[0][1],
        FIRST: lambda: _share(cluster.devices[0]) / _share(cluster.devices[-1]),
    }
    return {name: values[name]() for name in names}


def network_of(cluster: Cluster) -> Network:
    assert cluster.network is not None, cluster.name
    return cluster.network


def _share(device: Device) -> float:
    row = device.rows["elementwise"]
    assert isinstance(row, StreamRow)
    return row.points[-1][1] / device.memory_bandwidth_bytes_per_s


def patched(cluster: Cluster, constants: Mapping[str, float], level: int = 0, dtype: str = "float16") -> Cluster:
    """The cluster with these constants in place of those of its files."""
    device = cluster.devices[-1]
    rows = {kind: _patched_row(device, kind, row, constants, dtype) for kind, row in device.rows.items()}
    changed = replace(device, rows=rows, op_overhead_s=constants.get(OVERHEAD, device.op_overhead_s))
    network = cluster.network
    if network is not None:
        cluster = hosted(cluster, constants)
        changed = replace(changed, ops=cluster.devices[-1].ops)
        return replace(cluster, devices=(changed,) * cluster.num_devices, network=_patched_network(network, constants))
    levels = list(cluster.levels)
    if levels:
        levels[level] = _patched_level(levels[level], constants)
    devices = (changed,) * cluster.num_devices
    if FIRST in constants:
        devices = (slower(changed, constants[FIRST]), *devices[1:])
    return replace(cluster, devices=devices, levels=tuple(levels))


def slower(device: Device, speed: float) -> Device:
    """A device of which every op but its overhead takes 1 / speed as long."""

    def scaled(row: Row) -> Row:
        if isinstance(row, StreamRow):
            return StreamRow(tuple((size, rate * speed) for size, rate in row.points), row.overhead_s)
        shares = {dtype: share * speed for dtype, share in row.dtype_efficiency.items()}
        return replace(row, efficiency=row.efficiency * speed, dtype_efficiency=shares)

    return replace(device, rows={kind: scaled(row) for kind, row in device.rows.items()})


def _patched_row(device: Device, kind: str, row: Row, constants: Mapping[str, float], dtype: str) -> Row:
    overhead_s = constants.get(OVERHEAD, device.op_overhead_s)
    if isinstance(row, StreamRow):
        scale = constants.get(STREAM, _share(device)) / _share(device)
        return StreamRow(tuple((size, rate * scale) for size, rate in row.points), overhead_s)
    if kind in GEMM_KINDS[1:] or MATMUL not in constants:
        return replace(row, overhead_s=overhead_s)
    return replace(row, overhead_s=overhead_s, dtype_efficiency={**row.dtype_efficiency, dtype: constants[MATMUL]})


def _patched_level(level: Level, constants: Mapping[str, float]) -> Level:
    link = level.link.bandwidth_bytes_per_s * constants.get(LINK, level.efficiency) / level.efficiency
    bandwidth = constants.get(BANDWIDTH, link)
    return replace(level, start_s=constants.get(START, level.start_s), link=Link(level.link.latency_s, bandwidth))


def hosted(cluster: Cluster, constants: Mapping[str, float]) -> Cluster:
    """The cluster with hosts that take so long for an optimizer's step on each parameter, and for each call."""
    rows = {op: StreamRow(((1.0, 1.0 / constants[name]),), 0.0) for name, op in HOSTED.items() if name in constants}
    devices = {device: replace(device, ops={**device.ops, **rows}) for device in set(cluster.devices)}
    return replace(cluster, devices=tuple(devices[device] for device in cluster.devices))


def _patched_network(network: Network, constants: Mapping[str, float]) -> Network:
    """NIC: of links that are not shaped, those of a cluster of one region."""
    found = replace(network, copy_s_per_byte=1.0 / constants[COPY]) if COPY in constants else network
    if NIC in constants and len(network.regions) == 1:
        rate = network.bandwidth_bytes_per_s[0][0] * constants[NIC] / NIC_SHIPPED
        found = replace(found, bandwidth_bytes_per_s=((rate,),))
    return found


class Work:
    """What one step of a program is made of, counted once per stage to be priced often."""

    def __init__(self, program: Program, *, streams: bool = False) -> None:
        self.program, self.streams = program, streams
        self.stages: list[_StageWork] = []
        self._senders_of: Cluster | None = None  # held, not hashed: a cluster is a tuple of thousands of devices
        self._known_senders: dict[int, Mapping[tuple[int, int], int]] = {}
        self.equal: list[int] = []  # for each stage, the first one with the same work
        for stage in program.stages:
            blocks = [(*(b.instructions for b in s.chunks[0].blocks), s.step) for s in program.stages]
            own = blocks[len(self.equal)]
            same = next(k for k, other in enumerate(blocks) if all(a is b for a, b in zip(other, own, strict=True)))
            self.equal.append(same)
            self.stages.append(_StageWork.of(stage) if same == len(self.stages) else self.stages[same])

    def seconds(self, cluster: Cluster) -> float:
        """Equal to ``simulate(program, cluster, streams=streams, blocking=not streams).step_time_s``."""
        return step_time_s(self.program, (self.prices(cluster),), streams=self.streams, blocking=not self.streams)

    def prices(self, cluster: Cluster, replica: int = 0) -> list[StagePrice]:
        """Of one replica; equal to ``price_stages(program, cluster)``, but for kinds, where all are alike."""
        known: dict[tuple[int, int], StagePrice] = {}
        prices = []
        for index, work in enumerate(self.stages):
            place = self.program.devices[index, replica, 0]
            key = (self.equal[index] if cluster.network is None else index, id(cluster.devices[place]))
            if key not in known:
                known[key] = self._price(work, index, cluster, cluster.devices[place])
            chunk = replace(known[key].chunks[0], **self._transfers(index, cluster, replica))
            prices.append(replace(known[key], chunks=(chunk,)))
        return prices

    def _price(self, work: _StageWork, index: int, cluster: Cluster, device: Device) -> StagePrice:
        def messages_s(collectives: Iterable[tuple[Collective, int]]) -> float:
            return sum(count * self._message_s(collective, index, cluster) for collective, count in collectives)

        def block(part: _BlockWork) -> BlockPrice:
            view_s = device.op_overhead_s if device.kind == "cpu" else 0.0
            compute_s = _ops_s(device, part.costs) + part.views * view_s
            return BlockPrice(compute_s, messages_s(part.collectives.items()), {})

        return StagePrice(
            chunks=(ChunkPrice(block(work.forward), block(work.backward), 0.0, 0.0),),
            step_collectives_s=tuple(self._message_s(c, index, cluster) for c in work.once_collectives),
            step_gathers_s=tuple(self._message_s(c, index, cluster) for c in work.gathers),
            optimizer_s=_ops_s(device, work.once),
            optimizer_kinds_s={},
        )

    def _message_s(self, collective: Collective, index: int, cluster: Cluster) -> float:
        groups = axis_groups(self.program, collective.axis, index)
        alike = groups if cluster.network is not None else groups[:1]
        times = (cluster.collective_time_s(collective.kind, collective.nbytes, group) for group in alike)
        return max(times) if len(groups[0]) > 1 else 0.0

    def _transfers(self, index: int, cluster: Cluster, replica: int) -> dict[str, float]:
        sent = self.program.stages[index].chunks[0].sent
        if sent is None:
            return {"to_next_s": 0.0, "from_next_s": 0.0, "delay_s": 0.0}
        there = self.message_s(cluster, sent.nbytes, replica, index, index + 1)
        back = self.message_s(cluster, sent.nbytes, replica, index + 1, index)
        return {
            "to_next_s": there,
            "from_next_s": back,
            "delay_s": self.message_s(cluster, 0, replica, index, index + 1),
        }

    def link(self, cluster: Cluster, replica: int, source: int, target: int) -> Link:
        """What the first shard's messages between two neighbouring stages get while all others of this direction go
        on."""
        pair = (self.program.devices[source, replica, 0], self.program.devices[target, replica, 0])
        return network_of(cluster).link(*pair, self._senders(cluster, target - source)[pair])

    def message_s(self, cluster: Cluster, nbytes: int, replica: int, source: int, target: int) -> float:
        """The slowest shard's transfer between two neighbouring stages, while all others of this direction go on."""
        devices, program = self.program.devices, self.program
        users = self._senders(cluster, target - source)
        pairs = [(devices[source, replica, tp], devices[target, replica, tp]) for tp in range(program.tp)]
        return max(cluster.transfer_time_s(nbytes, *pair, users[pair]) for pair in pairs)

    def _senders(self, cluster: Cluster, step: int) -> Mapping[tuple[int, int], int]:
        """How many messages share the egress of each: from every stage to the next (step 1) or the one before (-1)."""
        if self._senders_of is not cluster:
            self._senders_of, self._known_senders = cluster, {}
        if step not in self._known_senders:
            devices, program = self.program.devices, self.program
            ends = ((s, s + step) for s in range(program.pp) if 0 <= s + step < program.pp)
            cells = [(dp, tp) for dp in range(program.dp) for tp in range(program.tp)]
            pairs = [(devices[(a, *cell)], devices[(b, *cell)]) for a, b in ends for cell in cells]
            self._known_senders[step] = dict(zip(pairs, cluster.senders(pairs), strict=True))
        return self._known_senders[step]


@dataclass(frozen=True)
class _BlockWork:
    costs: Counter[OpCost]
    views: int
    collectives: Counter[Collective]

    @staticmethod
    def of(block: Block) -> _BlockWork:
        priced = Counter(i.cost for i in block.instructions if i.cost is not None)
        views = sum(i.cost is None and i.collective is None for i in block.instructions)
        return _BlockWork(priced, views, Counter(i.collective for i in block.instructions if i.collective is not None))


@dataclass(frozen=True)
class _StageWork:
    forward: _BlockWork
    backward: _BlockWork
    once: Counter[OpCost]
    once_collectives: tuple[Collective, ...]
    gathers: tuple[Collective, ...]

    @staticmethod
    def of(stage: StageProgram) -> _StageWork:
        forward, backward = map(_BlockWork.of, stage.chunks[0].blocks)
        return _StageWork(
            forward, backward, Counter(stage.step.optimizer_costs), stage.step.collectives, stage.step.gathers
        )


def _ops_s(device: Device, costs: Counter[OpCost]) -> float:
    return sum(count * device.op_time_s(cost) for cost, count in costs.items())
