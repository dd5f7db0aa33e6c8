"""Checks of schedules: complete, with matched sends and receives, and free of deadlock."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.errors import VerificationError
from cost_model.schedule import (
    Backward,
    Forward,
    RecvBackward,
    RecvForward,
    SendBackward,
    SendForward,
    Step,
    Weight,
    backward_steps,
    forward_steps,
    sending,
)


class Guarantee(enum.Enum):
    """Under which sends a schedule is free of deadlock.

    ASYNCHRONOUS: a window of sends per direction may be pending, which is what the runtime does.
    RENDEZVOUS: even if every send blocks until it is received; implies ASYNCHRONOUS.
    """

    ASYNCHRONOUS = "asynchronous"
    RENDEZVOUS = "rendezvous"


def check_schedule(
    stages: Sequence[Sequence[Step]], microbatches: int, virtual_stages: int = 1, window: int = 1
) -> Guarantee:
    """Verify the step lists of all stages together and say what sends they are safe under.

    Raises VerificationError with check "schedule_complete" (a block missing, doubled or without its
    data), "schedule_matching" (sends and receives of neighbours differ) or "schedule_deadlock".
    """
    pp = len(stages)
    for stage, steps in enumerate(stages):
        _check_complete(stage, steps, pp, microbatches, virtual_stages)
    for stage, steps in enumerate(stages):
        _check_matching(stage, steps, stages)
    stuck = _stuck_positions(stages, pending=window)
    if stuck:
        where = ", ".join(f"stage {stage} at {stages[stage][at]}" for stage, at in sorted(stuck.items()))
        raise VerificationError("schedule_deadlock", f"no stage can go on: {where}")
    return Guarantee.ASYNCHRONOUS if _stuck_positions(stages, pending=0) else Guarantee.RENDEZVOUS


def _check_complete(stage: int, steps: Sequence[Step], pp: int, microbatches: int, virtual_stages: int) -> None:
    """Each microbatch has exactly the steps that each chunk of its stage needs, in the order its data flows.

    A stage that has weight blocks has one for every backward.
    """
    late: tuple[type[Step], ...] = (Weight,) if any(isinstance(step, Weight) for step in steps) else ()
    found: dict[tuple[int, int], list[Step]] = {
        (microbatch, chunk): [] for microbatch in range(microbatches) for chunk in range(virtual_stages)
    }
    for step in steps:
        if (step.microbatch, step.chunk) not in found:
            raise VerificationError("schedule_complete", f"stage {stage}: {step} of {microbatches} microbatches")
        found[step.microbatch, step.chunk].append(step)
    for (microbatch, chunk), own in found.items():
        forward = forward_steps(microbatch, chunk, stage, pp, virtual_stages)
        backward = backward_steps(microbatch, chunk, stage, pp, virtual_stages)
        if not _flows(own, forward, backward, [kind(microbatch, chunk) for kind in late]):
            listed = ", ".join(type(step).__name__ for step in own)
            where = f"stage {stage}, chunk {chunk}, microbatch {microbatch}"
            raise VerificationError("schedule_complete", f"{where}: has {listed}")


def _flows(own: Sequence[Step], forward: list[Step], backward: list[Step], late: list[Step]) -> bool:
    """Post before receive before forward before send, forward before backward, and the same on the way back; then what
    is late.

    RecvBackward may stand anywhere before its backward, even before SendForward.
    """
    wanted = forward + backward + late
    if len(own) != len(wanted) or set(own) != set(wanted):
        return False
    at = {type(step): index for index, step in enumerate(own)}
    chains = ([at[type(step)] for step in chain] for chain in (forward, backward))
    flows = at[Forward] < at[Backward] and all(chain == sorted(chain) for chain in chains)
    return flows and all(at[Backward] < at[type(step)] for step in late)


def _check_matching(stage: int, steps: Sequence[Step], stages: Sequence[Sequence[Step]]) -> None:
    """What a stage receives is what its neighbour sends, in the same order, both ways."""
    for kind in (RecvForward, RecvBackward):
        wanted = [sending(step, stage, len(stages)) for step in steps if isinstance(step, kind)]
        for source in {source for source, _ in wanted}:
            send_kind = SendForward if kind is RecvForward else SendBackward
            sent = [step for step in stages[source] if isinstance(step, send_kind)]
            received = [step for _, step in wanted]
            if sent != received:
                link = f"stages {source} -> {stage}"
                raise VerificationError("schedule_matching", f"{link}: sends {_text(sent)}, receives {_text(received)}")


def _text(steps: Sequence[Step]) -> str:
    return ", ".join(f"{step.microbatch}/{step.chunk}" for step in steps)


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
            while positions[stage] < len(steps) and _passes(
                steps[positions[stage]], stage, len(stages), channels, pending
            ):
                positions[stage] += 1
                moved = True
    return {stage: at for stage, at in enumerate(positions) if at < len(stages[stage])}


@dataclass
class _Channel:
    """Messages one way between two neighbours: the newest that was posted, and how many await their receive."""

    newest: Step | None = None
    incomplete: int = 0


def _passes(step: Step, stage: int, pp: int, channels: dict[tuple[type[Step], int], _Channel], pending: int) -> bool:
    """Whether a stage gets past a step now; a send that does not is posted all the same."""
    if isinstance(step, SendForward | SendBackward):
        channel = channels.setdefault((type(step), stage), _Channel())
        if channel.newest != step:
            channel.newest = step
            channel.incomplete += 1
        return channel.incomplete <= pending
    if isinstance(step, RecvForward | RecvBackward):
        source, sent = sending(step, stage, pp)
        return _receives(channels.get((type(sent), source)))
    return True


def _receives(channel: _Channel | None) -> bool:
    if channel is None or not channel.incomplete:
        return False
    channel.incomplete -= 1
    return True
