"""Hardware of the reference tables: the shipped files, with the constants that rows may fix put in by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from cost_model.cluster import Cluster, Level
from cost_model.collectives import Link
from cost_model.device import GEMM_KINDS, Device, GemmRow, Row, StreamRow
from cost_model.prices import BlockPrice, ChunkPrice, StagePrice, axis_groups
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
        FIRST: lambda: _share(cluster.devices[0]) / _share(cluster.devices[-1]),
    }
    return {name: values[name]() for name in names}


def _share(device: Device) -> float:
    row = device.rows["elementwise"]
    assert isinstance(row, StreamRow)
    return row.points[-1][1] / device.memory_bandwidth_bytes_per_s


def patched(cluster: Cluster, constants: Mapping[str, float], level: int = 0, dtype: str = "float16") -> Cluster:
    """The cluster with these constants in place of those of its files."""
    device = cluster.devices[-1]
    rows = {kind: _patched_row(device, kind, row, constants, dtype) for kind, row in device.rows.items()}
    changed = replace(device, rows=rows, op_overhead_s=constants.get(OVERHEAD, device.op_overhead_s))
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


class Work:
    """What one step of a program is made of, counted once per stage to be priced often."""

    def __init__(self, program: Program, *, streams: bool = False) -> None:
        self.program, self.streams = program, streams
        self.stages: list[_StageWork] = []
        self.equal: list[int] = []  # for each stage, the first one with the same work
        for stage in program.stages:
            blocks = [(*(b.instructions for b in s.chunks[0].blocks), s.step) for s in program.stages]
            own = blocks[len(self.equal)]
            same = next(k for k, other in enumerate(blocks) if all(a is b for a, b in zip(other, own, strict=True)))
            self.equal.append(same)
            self.stages.append(_StageWork.of(stage) if same == len(self.stages) else self.stages[same])

    def seconds(self, cluster: Cluster) -> float:
        """Equal to ``simulate(program, cluster, streams=streams).step_time_s``."""
        return step_time_s(self.program, self.prices(cluster), streams=self.streams)

    def prices(self, cluster: Cluster) -> list[StagePrice]:
        """Equal to ``price_stages(program, cluster)``, but for kinds."""
        known: dict[tuple[int, int], StagePrice] = {}
        prices = []
        for index, work in enumerate(self.stages):
            place = self.program.devices[index, 0, 0]
            key = (self.equal[index] if cluster.network is None else index, id(cluster.devices[place]))
            if key not in known:
                known[key] = self._price(work, index, cluster, cluster.devices[place])
            chunk = replace(known[key].chunks[0], **self._transfers(index, cluster))
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
        group = axis_groups(self.program, collective.axis, index)[0]
        return cluster.collective_time_s(collective.kind, collective.nbytes, group) if len(group) > 1 else 0.0

    def _transfers(self, index: int, cluster: Cluster) -> dict[str, float]:
        sent = self.program.stages[index].chunks[0].sent
        if sent is None:
            return {"to_next_s": 0.0, "from_next_s": 0.0, "delay_s": 0.0}
        here, there = self.program.devices[index, 0, 0], self.program.devices[index + 1, 0, 0]
        return {
            "to_next_s": cluster.transfer_time_s(sent.nbytes, here, there),
            "from_next_s": cluster.transfer_time_s(sent.nbytes, there, here),
            "delay_s": cluster.transfer_time_s(0, here, there),
        }


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
