"""Binding: what would make a program faster, found by simulating it where one thing at a time is twice as fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.cluster import Cluster
from cost_model.cold_calls import ColdCalls
from cost_model.device import Device
from cost_model.program import OpCost, Program
from cost_model.simulate import simulate

COMPUTING = "computing"
FACTOR = 2.0


@dataclass(frozen=True)
class _Fast:
    """A device that takes half the time."""

    device: Device

    @property
    def kind(self) -> str:
        return self.device.kind

    @property
    def op_overhead_s(self) -> float:
        return self.device.op_overhead_s / FACTOR

    @property
    def cold_calls(self) -> ColdCalls | None:
        return self.device.cold_calls and self.device.cold_calls.faster(FACTOR)

    def op_time_s(self, cost: OpCost, /) -> float:
        return self.device.op_time_s(cost) / FACTOR

    def call_overhead_s(self, cost: OpCost, /) -> float:
        return self.device.call_overhead_s(cost) / FACTOR

    def step_s(self, tensors: int, /) -> float:
        return self.device.step_s(tensors) / FACTOR


@dataclass(frozen=True)
class _Hastened:
    """A cluster where one thing takes half the time: computing, or what crosses the links of one name."""

    cluster: Cluster
    what: str

    @property
    def devices(self) -> Sequence[Device | _Fast]:
        if self.what != COMPUTING:
            return self.cluster.devices
        fast = {id(device): _Fast(device) for device in self.cluster.devices}
        return [fast[id(device)] for device in self.cluster.devices]

    @property
    def uneven(self) -> bool:
        return self.cluster.uneven

    @property
    def rendezvous(self) -> bool:
        return self.cluster.rendezvous

    @property
    def crowding(self) -> float:
        return self.cluster.crowding

    def collective_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...], /) -> float:
        return self.cluster.collective_time_s(kind, nbytes, devices) / self._factor(devices)

    def once_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...], /) -> float:
        return self.cluster.once_time_s(kind, nbytes, devices) / self._factor(devices)

    def behind_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...], /) -> float:
        return self.cluster.behind_time_s(kind, nbytes, devices) / self._factor(devices)

    def transfer_time_s(self, nbytes: int, source: int, target: int, senders: int | None = None, /) -> float:
        return self.cluster.transfer_time_s(nbytes, source, target, senders) / self._factor((source, target))

    def handling_time_s(self, nbytes: int, source: int, target: int, /) -> float:
        return self.cluster.handling_time_s(nbytes, source, target)

    def senders(self, pairs: Sequence[tuple[int, int]], /) -> Sequence[int]:
        return self.cluster.senders(pairs)

    def _factor(self, devices: tuple[int, ...]) -> float:
        crosses = len(set(devices)) > 1 and self.cluster.link_name(devices) == self.what
        return FACTOR if crosses else 1.0


def savings(program: Program, cluster: Cluster) -> tuple[tuple[str, float], ...]:
    """Part of the step that is saved where each thing alone is twice as fast, largest first; what saves nothing is
    left out."""
    step_s = simulate(program, cluster).step_time_s
    names = dict.fromkeys((COMPUTING, *_links(cluster)))
    saved = [(name, 1.0 - simulate(program, _Hastened(cluster, name)).step_time_s / step_s) for name in names]
    return tuple(sorted(((name, part) for name, part in saved if part > 0), key=lambda item: -item[1]))


def _links(cluster: Cluster) -> list[str]:
    """Every name that ``Cluster.link_name`` may give."""
    if cluster.network is not None:
        return ["links inside nodes", "links between nodes"]
    return [level.name for level in cluster.levels]
