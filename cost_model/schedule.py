"""The order of work of each pipeline stage: the lists that code generation prints and the simulator times.

A send is posted asynchronously; before the next send in the same direction is posted, and after
the last step, the earlier one is waited for. A receive blocks where it stands. The two directions
use separate channels, so a pending send never holds up traffic the other way.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.errors import UnknownNameError, UnsupportedError, VerificationError
from cost_model.plan import SCHEDULES

IMPLEMENTED = ("gpipe", "1f1b")


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the forward block of one microbatch."""

    microbatch: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the backward block of one microbatch."""

    microbatch: int


@dataclass(frozen=True, slots=True)
class SendForward:
    """Post the send of an activation to the next stage."""

    microbatch: int


@dataclass(frozen=True, slots=True)
class RecvForward:
    """Receive an activation from the previous stage; blocks."""

    microbatch: int


@dataclass(frozen=True, slots=True)
class SendBackward:
    """Post the send of a gradient to the previous stage."""

    microbatch: int


@dataclass(frozen=True, slots=True)
class RecvBackward:
    """Receive a gradient from the next stage; blocks."""

    microbatch: int


Step = Forward | Backward | SendForward | RecvForward | SendBackward | RecvBackward


class Guarantee(enum.Enum):
    """Under which sends a schedule is free of deadlock.

    ASYNCHRONOUS: one send per direction may be pending, which is what the runtime does.
    RENDEZVOUS: even if every send blocks until it is received; implies ASYNCHRONOUS.
    """

    ASYNCHRONOUS = "asynchronous"
    RENDEZVOUS = "rendezvous"


def in_flight(schedule: str, stage: int, pp: int, microbatches: int) -> int:
    """Most microbatches of a stage whose forward has begun and whose backward has not ended.

    gpipe: all; 1f1b: pp - stage (Narayanan et al., 2021, "Efficient large-scale language model training", 2.2).
    """
    return min(_warmup(schedule, stage, pp, microbatches) + 1, microbatches)


@functools.lru_cache(maxsize=1024)
def stage_schedule(schedule: str, stage: int, pp: int, microbatches: int) -> tuple[Step, ...]:
    """Steps of one stage in order: warm-up forwards, then pairs of forward and backward, then the backwards left.

    Backwards run in the order of the forwards, so gradients are summed in the same order in every schedule.
    """
    warmup = _warmup(schedule, stage, pp, microbatches)
    steps: list[Step] = []
    for microbatch in range(warmup):
        steps += _forward(microbatch, stage, pp)
    for microbatch in range(warmup, microbatches):
        steps += _forward(microbatch, stage, pp)
        steps += _backward(microbatch - warmup, stage, pp)
    for microbatch in range(microbatches - warmup, microbatches):
        steps += _backward(microbatch, stage, pp)
    return tuple(steps)


def check_schedule(stages: Sequence[Sequence[Step]], microbatches: int) -> Guarantee:
    """Verify the step lists of all stages together and say what sends they are safe under.

    Raises VerificationError with check "schedule_complete" (a block missing, doubled or without its
    data), "schedule_matching" (sends and receives of neighbours differ) or "schedule_deadlock".
    """
    for stage, steps in enumerate(stages):
        _check_complete(stage, steps, len(stages), microbatches)
    for stage in range(len(stages) - 1):
        _check_matching(stage, stages[stage], stages[stage + 1])
    stuck = _stuck_positions(stages, pending=1)
    if stuck:
        where = ", ".join(f"stage {stage} at {stages[stage][at]}" for stage, at in sorted(stuck.items()))
        raise VerificationError("schedule_deadlock", f"no stage can go on: {where}")
    return Guarantee.ASYNCHRONOUS if _stuck_positions(stages, pending=0) else Guarantee.RENDEZVOUS


def _warmup(schedule: str, stage: int, pp: int, microbatches: int) -> int:
    """Forwards before the first backward, less the one that is paired with it in 1f1b."""
    assert 0 <= stage < pp and microbatches >= 1, (stage, pp, microbatches)
    if schedule == "gpipe":
        return microbatches
    if schedule == "1f1b":
        return min(pp - 1 - stage, microbatches)
    if schedule in SCHEDULES:
        raise UnsupportedError(f"schedule {schedule!r} is not built yet; pin schedule='1f1b' or 'gpipe'")
    raise UnknownNameError("schedule", schedule, IMPLEMENTED)


def _forward(microbatch: int, stage: int, pp: int) -> list[Step]:
    steps: list[Step] = [Forward(microbatch)]
    if stage > 0:
        steps.insert(0, RecvForward(microbatch))
    if stage < pp - 1:
        steps.append(SendForward(microbatch))
    return steps


def _backward(microbatch: int, stage: int, pp: int) -> list[Step]:
    steps: list[Step] = [Backward(microbatch)]
    if stage < pp - 1:
        steps.insert(0, RecvBackward(microbatch))
    if stage > 0:
        steps.append(SendBackward(microbatch))
    return steps


def _check_complete(stage: int, steps: Sequence[Step], pp: int, microbatches: int) -> None:
    """Each microbatch has exactly the steps its stage needs, in the order its data flows."""
    found: dict[int, list[Step]] = {microbatch: [] for microbatch in range(microbatches)}
    for step in steps:
        if step.microbatch not in found:
            raise VerificationError("schedule_complete", f"stage {stage}: {step} of {microbatches} microbatches")
        found[step.microbatch].append(step)
    for microbatch, own in found.items():
        if not _flows(own, microbatch, stage, pp):
            listed = ", ".join(type(step).__name__ for step in own)
            raise VerificationError("schedule_complete", f"stage {stage}, microbatch {microbatch}: has {listed}")


def _flows(own: Sequence[Step], microbatch: int, stage: int, pp: int) -> bool:
    """Receive before forward before send, forward before backward, and the same on the way back.

    RecvBackward may stand anywhere before its backward, even before SendForward.
    """
    forward, backward = _forward(microbatch, stage, pp), _backward(microbatch, stage, pp)
    if len(own) != len(forward + backward) or set(own) != set(forward + backward):
        return False
    at = {type(step): index for index, step in enumerate(own)}
    chains = ([at[type(step)] for step in chain] for chain in (forward, backward))
    return at[Forward] < at[Backward] and all(chain == sorted(chain) for chain in chains)


def _check_matching(stage: int, before: Sequence[Step], after: Sequence[Step]) -> None:
    """What a stage sends is what its neighbour receives, in the same order, both ways."""
    _check_link(f"{stage} -> {stage + 1}", _order(before, SendForward), _order(after, RecvForward))
    _check_link(f"{stage + 1} -> {stage}", _order(after, SendBackward), _order(before, RecvBackward))


def _check_link(link: str, sent: list[int], received: list[int]) -> None:
    if sent != received:
        raise VerificationError("schedule_matching", f"stages {link}: sends {sent} but receives {received}")


def _order(steps: Sequence[Step], kind: type[Step]) -> list[int]:
    return [step.microbatch for step in steps if type(step) is kind]


def _stuck_positions(stages: Sequence[Sequence[Step]], pending: int) -> dict[int, int]:
    """Stage -> index of the step it can never pass, running all stages as far as they go.

    pending: sends per channel that may be incomplete when the sender goes on (0: rendezvous).
    """
    positions = [0] * len(stages)
    channels: dict[tuple[type[Step], int], _Channel] = {}
    moved = True
    while moved:
        moved = False
        for stage, steps in enumerate(stages):
            while positions[stage] < len(steps) and _passes(steps[positions[stage]], stage, channels, pending):
                positions[stage] += 1
                moved = True
    return {stage: at for stage, at in enumerate(positions) if at < len(stages[stage])}


@dataclass
class _Channel:
    """Messages one way between two neighbours: the newest that was posted, and how many await their receive."""

    newest: int = -1
    incomplete: int = 0


def _passes(step: Step, stage: int, channels: dict[tuple[type[Step], int], _Channel], pending: int) -> bool:
    """Whether a stage gets past a step now; a send that does not is posted all the same."""
    match step:
        case SendForward() | SendBackward():
            channel = channels.setdefault((type(step), stage), _Channel())
            if channel.newest != step.microbatch:
                channel.newest = step.microbatch
                channel.incomplete += 1
            return channel.incomplete <= pending
        case RecvForward():
            return _receives(channels.get((SendForward, stage - 1)))
        case RecvBackward():
            return _receives(channels.get((SendBackward, stage + 1)))
    return True


def _receives(channel: _Channel | None) -> bool:
    if channel is None or not channel.incomplete:
        return False
    channel.incomplete -= 1
    return True
