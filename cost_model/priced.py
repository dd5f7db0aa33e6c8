"""What pricing asks of hardware."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cost_model.cold_calls import ColdCalls
from cost_model.program import OpCost


class PricedDevice(Protocol):
    """What pricing asks of a device: seconds of an op, its fixed overhead included."""

    @property
    def kind(self) -> str: ...

    @property
    def op_overhead_s(self) -> float: ...

    @property
    def cold_calls(self) -> ColdCalls | None: ...

    def op_time_s(self, cost: OpCost, /) -> float: ...

    def call_overhead_s(self, cost: OpCost, /) -> float: ...

    def step_s(self, tensors: int, /) -> float: ...


class PricedCluster(Protocol):
    """What pricing asks of a cluster; ``devices`` are indexed as in ``Program.devices``.

    uneven: whether devices or links differ, so that replicas may take times of their own. rendezvous: whether a message
    leaves only once its sender knows that it is awaited, beyond what transfers count. crowding: ranks per core where
    they share cores, of which all prices count that all compute; else 1.
    """

    @property
    def devices(self) -> Sequence[PricedDevice]: ...

    @property
    def uneven(self) -> bool: ...

    @property
    def rendezvous(self) -> bool: ...

    @property
    def crowding(self) -> float: ...

    def collective_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...], /) -> float: ...

    def once_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...], /) -> float: ...

    def behind_time_s(self, kind: str, nbytes: int, devices: tuple[int, ...], /) -> float: ...

    def transfer_time_s(self, nbytes: int, source: int, target: int, senders: int | None = None, /) -> float: ...

    def handling_time_s(self, nbytes: int, source: int, target: int, /) -> float: ...

    def senders(self, pairs: Sequence[tuple[int, int]], /) -> Sequence[int]: ...
