"""Which configurations there are: degrees and microbatch sizes that pins, devices and batch allow."""

from __future__ import annotations

from collections.abc import Iterator

from autopar.planner.chain import Floor
from autopar.planner.configuration import Configuration
from autopar.planner.solution import Pins
from cost_model.errors import UnknownNameError
from cost_model.parallelism import SCHEDULES
from cost_model.schedule import refusal


def configurations(num_devices: int, batch: int, pins: Pins, crowding: float = 1.0) -> Iterator[Configuration]:
    """All configurations that pins, devices and batch allow, in the order that breaks ties. crowding: of a cluster."""
    if pins.schedule not in (None, *SCHEDULES):
        raise UnknownNameError("schedule", pins.schedule, SCHEDULES)
    for pp in _divisors(num_devices, pins.pp):
        if pins.pipelined and pp == 1:
            continue
        for tp in _divisors(num_devices // pp, pins.tp):
            dp = num_devices // pp // tp
            if pins.dp not in (None, dp) or batch % dp:
                continue
            for size in reversed(_divisors(batch // dp, pins.microbatch_size)):
                schedule, window = pins.schedule or "1f1b", pins.window or 1
                shape = (dp, tp, pp, schedule, size, batch // dp // size, pins.parts, window)
                yield Configuration(*shape, crowding=crowding)


def _divisors(number: int, pinned: int | None) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0 and pinned in (None, d)]


def refused_because(c: Configuration, floor: Floor | None) -> tuple[int, str] | None:
    """Why a configuration cannot be, and how far it is from being possible: where none is, the one that is nearest
    tells why, since another number of microbatches does not help a model that cannot be cut or sharded so."""
    if floor is None:
        return 0, f"dp={c.dp} tp={c.tp} microbatch_size={c.microbatch_size} cannot shard the model"
    if c.pp * c.virtual_stages > floor.segments:
        virtual = "" if c.virtual_stages == 1 else f" x virtual_stages={c.virtual_stages}"
        return 1, f"pp={c.pp}{virtual} is more than the {floor.segments} segments the model can be cut into"
    refused = refusal(c.schedule, c.pp, c.microbatches, c.virtual_stages)
    return None if refused is None else (2, refused)
