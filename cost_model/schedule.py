"""The order of work of each pipeline stage: the lists that code generation prints and the simulator times.

A send is posted asynchronously; before the next send in the same direction is posted, and after
the last step, the earlier one is waited for. A receive is posted before the block that runs before
it, so that the message travels behind that, and waited for where it is needed. The two directions
use separate channels, so a pending send never holds up traffic the other way.

A stage holds ``virtual_stages`` chunks of the model: chunk c of stage s is number c x pp + s of the chain, so that the
last stage sends on to the next chunk of the first. ``cost_model.schedule_check`` proves that no order can hang.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cost_model.errors import ParallelismError, UnknownNameError
from cost_model.parallelism import SCHEDULES


@dataclass(frozen=True, slots=True)
class Forward:
    """Run the forward block of one microbatch."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Backward:
    """Run the backward block of one microbatch."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class PostForward:
    """Post the receive of an activation."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class PostBackward:
    """Post the receive of a gradient."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class SendForward:
    """Post the send of a chunk's activation to the next stage."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class RecvForward:
    """Wait for a chunk's activation from the previous stage."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class SendBackward:
    """Post the send of a chunk's gradient to the previous stage."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class RecvBackward:
    """Wait for a chunk's gradient from the next stage."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Weight:
    """Run the weight block of one microbatch: the part of its backward that no other stage waits for."""

    microbatch: int
    chunk: int = 0


Step = (
    Forward | Backward | Weight | SendForward | PostForward | RecvForward | SendBackward | PostBackward | RecvBackward
)
COMPUTE = (Forward, Backward, Weight)
POSTS: dict[type[Step], type[Step]] = {RecvForward: PostForward, RecvBackward: PostBackward}


def splits_backward(schedule: str, stage: int) -> bool:
    """Whether a stage runs gradients of parameters apart; for the first one nobody waits anyway."""
    return schedule == "zero_bubble" and stage > 0


def check_counts(schedule: str, pp: int, microbatches: int, virtual_stages: int) -> None:
    """ParallelismError where a schedule cannot run with these counts."""
    reason = refusal(schedule, pp, microbatches, virtual_stages)
    if reason is not None:
        raise ParallelismError(reason)


def refusal(schedule: str, pp: int, microbatches: int, virtual_stages: int) -> str | None:
    """Why a schedule cannot run with these counts, and what can be done; None where it can."""
    if schedule != "interleaved":
        if virtual_stages == 1:
            return None
        return f"schedule={schedule!r} has one virtual stage on each stage, not {virtual_stages}; use 'interleaved'"
    if pp < 2 or virtual_stages < 2:
        return (
            f"schedule='interleaved' needs at least 2 stages of at least 2 virtual stages, not pp={pp} with "
            f"virtual_stages={virtual_stages}; use more of them, or schedule='1f1b'"
        )
    if microbatches % pp:
        return (
            f"schedule='interleaved' needs a multiple of pp={pp} microbatches, not {microbatches}; change "
            "microbatch_size or the batch, or use schedule='1f1b'"
        )
    return None


def in_flight(schedule: str, stage: int, pp: int, microbatches: int, virtual_stages: int = 1, window: int = 1) -> int:
    """Most forwards of a stage's chunks that have begun and whose backwards (or weight blocks) have not ended.

    gpipe: all; 1f1b: 1 + window (pp - stage - 1), where a window of one is that of Narayanan et al., 2021, "Efficient
    large-scale language model training", 2.2; zero_bubble: pp.
    """
    late = stage if splits_backward(schedule, stage) else 0
    count = microbatches * virtual_stages
    return min(_warmup(schedule, stage, pp, microbatches, virtual_stages, window) + 1 + late, count)


def telling_microbatches(
    schedule: str, stage: int, pp: int, microbatches: int, virtual_stages: int = 1, window: int = 1
) -> int:
    """So few microbatches that a stage's schedule of them begins and ends as that of all, which only repeats more often
    what comes between; all where there is no such number."""
    warmup = -(-_warmup(schedule, stage, pp, microbatches, virtual_stages, window) // virtual_stages)
    late = stage if splits_backward(schedule, stage) else 0
    least = warmup + late + 2 * window + 2
    if virtual_stages > 1:
        least = -(-least // pp) * pp + 2 * pp
    return least if least < microbatches else microbatches


@functools.lru_cache(maxsize=1024)
def stage_schedule(
    schedule: str, stage: int, pp: int, microbatches: int, virtual_stages: int = 1, window: int = 1
) -> tuple[Step, ...]:
    """Steps of one stage in order: warm-up forwards, then pairs of forward and backward, then the backwards left.

    window: microbatches that 1f1b has under way for each stage that comes after, and messages that may be under way on
    each channel: with more than one, transfers that take longer than a block hide behind several (Zhuang et al., 2022,
    "On optimizing the communication of model parallelism", has two of them).
    zero_bubble: stage s runs each weight block after the backward of s microbatches later, so that what it waits for in
    the end is filled and no stage holds more than the first (ZB-H1 of Qi et al., 2023, "Zero bubble pipeline
    parallelism", 2.3). Backwards of a chunk run in the order of its forwards, so gradients are summed in the same order
    in every schedule.
    """
    check_counts(schedule, pp, microbatches, virtual_stages)
    warmup = _warmup(schedule, stage, pp, microbatches, virtual_stages, window)
    forwards, backwards = _in_groups(pp, microbatches, virtual_stages)
    steps: list[Step] = []
    for forward in forwards[:warmup]:
        steps += forward_steps(*forward, stage, pp, virtual_stages)
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        steps += forward_steps(*forward, stage, pp, virtual_stages)
        steps += backward_steps(*backward, stage, pp, virtual_stages)
    for backward in backwards[len(backwards) - warmup :]:
        steps += backward_steps(*backward, stage, pp, virtual_stages)
    if splits_backward(schedule, stage):
        steps = list(_with_weights(steps, stage, microbatches))
    return tuple(_posted_early(steps, window))


def _posted_early(steps: Sequence[Step], window: int) -> list[Step]:
    """Each post moved before the last block that runs before its receive, and before two more, a forward and a
    backward, for each further message of the window; though not before its channel has room for it."""
    early: list[Step] = []
    for step in steps:
        is_post = isinstance(step, PostForward | PostBackward)
        early.insert(_post_place(early, type(step), window) if is_post else len(early), step)
    return early


def _post_place(before: Sequence[Step], post: type[Step], window: int) -> int:
    """Where a post goes among the steps before it; only the last few are looked at."""
    place, blocks, received = len(before), 0, 0
    for at in range(len(before) - 1, -1, -1):
        kind = type(before[at])
        received += POSTS.get(kind) is post
        if kind is post or received == window:
            return at + 1
        if kind in COMPUTE:
            place, blocks = at, blocks + 1
            if blocks == 2 * window - 1:
                return at
    return place


def _with_weights(steps: Sequence[Step], late: int, microbatches: int) -> Iterator[Step]:
    """Each weight block after all of the backward of ``late`` microbatches later, the last ones at the end."""
    for step in steps:
        yield step
        if isinstance(step, SendBackward) and step.microbatch >= late:
            yield Weight(step.microbatch - late)
    yield from (Weight(microbatch) for microbatch in range(max(0, microbatches - late), microbatches))


def _in_groups(pp: int, microbatches: int, virtual_stages: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(microbatch, chunk) of all forwards and of all backwards in order: pp microbatches through each chunk in turn."""
    groups = [range(first, min(first + pp, microbatches)) for first in range(0, microbatches, pp)]
    chunks = range(virtual_stages)
    forwards = [(m, chunk) for group in groups for chunk in chunks for m in group]
    backwards = [(m, chunk) for group in groups for chunk in reversed(chunks) for m in group]
    return forwards, backwards


def _warmup(schedule: str, stage: int, pp: int, microbatches: int, virtual_stages: int, window: int) -> int:
    """Forwards before the first backward, less the one that is paired with it in 1f1b.

    interleaved: Narayanan et al., 2021, 2.2: until the first microbatch comes back to the stage in its last chunk,
    with one more for each stage that it must pass after this one, there and back.
    """
    assert 0 <= stage < pp and microbatches >= 1, (stage, pp, microbatches)
    if schedule == "gpipe":
        return microbatches
    if schedule == "1f1b":
        return min(window * (pp - 1 - stage), microbatches)
    if schedule == "zero_bubble":
        return min(pp - 1 - stage, microbatches)
    if schedule == "interleaved":
        return min(2 * (pp - 1 - stage) + (virtual_stages - 1) * pp, virtual_stages * microbatches)
    raise UnknownNameError("schedule", schedule, SCHEDULES)


def forward_steps(microbatch: int, chunk: int, stage: int, pp: int, virtual_stages: int) -> list[Step]:
    """A forward with the transfers that its place in the chain needs."""
    steps: list[Step] = [Forward(microbatch, chunk)]
    if not is_first(stage, chunk):
        steps[:0] = [PostForward(microbatch, chunk), RecvForward(microbatch, chunk)]
    if not is_last(stage, chunk, pp, virtual_stages):
        steps.append(SendForward(microbatch, chunk))
    return steps


def backward_steps(microbatch: int, chunk: int, stage: int, pp: int, virtual_stages: int) -> list[Step]:
    """A backward with the transfers that its place in the chain needs."""
    steps: list[Step] = [Backward(microbatch, chunk)]
    if not is_last(stage, chunk, pp, virtual_stages):
        steps[:0] = [PostBackward(microbatch, chunk), RecvBackward(microbatch, chunk)]
    if not is_first(stage, chunk):
        steps.append(SendBackward(microbatch, chunk))
    return steps


def is_first(stage: int, chunk: int) -> bool:
    """Whether a chunk begins the chain."""
    return stage == chunk == 0


def is_last(stage: int, chunk: int, pp: int, virtual_stages: int) -> bool:
    """Whether a chunk ends the chain."""
    return stage == pp - 1 and chunk == virtual_stages - 1


def sending(step: RecvForward | RecvBackward, stage: int, pp: int) -> tuple[int, SendForward | SendBackward]:
    """The stage and the step that send what a step receives."""
    if isinstance(step, RecvForward):
        return (stage - 1) % pp, SendForward(step.microbatch, step.chunk - (stage == 0))
    return (stage + 1) % pp, SendBackward(step.microbatch, step.chunk + (stage == pp - 1))
