"""Simulate one step of a program: each stage's streams, event by event.

By symmetry one rank stands for all ranks of a stage; where devices or links differ, for those of one replica. A
transfer begins when both ends have posted it (gloo and NCCL both move data only then), occupies no compute of the
sender, and holds the receiver, whose receive blocks where it stands. Collectives block. Nothing overlaps that the
runtime does not overlap.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.axes import is_inside_replica
from cost_model.axis_groups import TIED, collective_stages
from cost_model.collector import collector_paused
from cost_model.errors import VerificationError
from cost_model.estimate import Estimate, MemoryBreakdown, StageEstimate, TimeBreakdown
from cost_model.memory import allocator_rounding, stage_memory
from cost_model.plan import Plan
from cost_model.priced import PricedCluster
from cost_model.prices import Replicas, StagePrice, price_replicas
from cost_model.program import Collective, Program
from cost_model.rank_clock import BEHIND, STREAMS, Event, Link, Rank, Receives
from cost_model.schedule import (
    RecvBackward,
    RecvForward,
    SendBackward,
    SendForward,
    stage_schedule,
)
from cost_model.shared_cores import shared_clock


@dataclass(frozen=True)
class SimulationResult:
    """One step. The breakdown is of the stage that finishes last (the first of several) and sums to step_time_s."""

    step_time_s: float
    stages: tuple[StageEstimate, ...]
    breakdown: TimeBreakdown
    timeline: tuple[Event, ...]

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages)


@collector_paused()
def simulate(
    program: Program,
    cluster: PricedCluster,
    *,
    driving_s: float = 0.0,
    streams: bool = False,
    blocking: bool = False,
    memories: Sequence[MemoryBreakdown] = (),
    told: bool = True,
) -> SimulationResult:
    """Time and memory of one step of this very program.

    driving_s: what starting a step and collecting its loss costs, counted as ``other``. streams: as runtimes do that
    give each rank one stream for sends and one for receives (not autopar's): both run through their messages in
    program order, ahead of the compute that needs them, and a message moves once it is at the head of both. blocking:
    as runtimes do that post a receive only where they need the message. memories: of each stage, where they are known.
    told: with the timeline.
    Raises VerificationError with check "deadlock" or "step_collectives" if ranks wait for each other forever.
    """
    assert len(program.stages) == program.pp and len(program.devices) == program.num_devices
    receives = _mode(streams, blocking)
    replicas = [_run_schedule(program, prices, receives, told=told) for prices in price_replicas(program, cluster)]
    _run_step_work(program, replicas)
    ranks = _slowest(program, replicas, cluster.crowding)
    last = max(ranks, key=lambda rank: rank.now)
    return SimulationResult(
        step_time_s=last.now + driving_s,
        stages=tuple(
            _stage_estimate(program, rank, memories[rank.stage] if memories else _memory(program, cluster, rank.stage))
            for rank in ranks
        ),
        breakdown=last.breakdown(driving_s),
        timeline=tuple(event for rank in ranks for event in rank.events or ()),
    )


def step_time_s(
    program: Program,
    replicas: Replicas,
    *,
    crowding: float = 1.0,
    limit_s: float = math.inf,
    streams: bool = False,
    blocking: bool = False,
) -> float:
    """Seconds of one step at given prices of the stages of each replica that differs; as ``simulate``, without memory
    and timeline. Infinite as soon as one replica alone takes longer than a limit. crowding: of the cluster."""
    runs = []
    for prices in replicas:
        runs.append(_run_schedule(program, prices, _mode(streams, blocking), told=False))
        if max(rank.now for rank in runs[-1]) > limit_s * crowding:
            return math.inf
    _run_step_work(program, runs)
    return max(rank.now for rank in _slowest(program, runs, crowding))


def _mode(streams: bool, blocking: bool) -> Receives:
    assert not (streams and blocking)
    return Receives.STREAMS if streams else Receives.BLOCKING if blocking else Receives.EARLY


def estimate_of(result: SimulationResult, plan: Plan, notes: Sequence[str], search_s: float, gap: float) -> Estimate:
    """The figures of a simulated program beside the plan it was made from."""
    return Estimate(
        step_time_s=result.step_time_s,
        peak_bytes=result.peak_bytes,
        stages=result.stages,
        breakdown=result.breakdown,
        notes=tuple(notes),
        plan=plan,
        search_s=search_s,
        gap=gap,
    )


def chrome_trace(result: SimulationResult) -> dict[str, object]:
    """The timeline in the trace event format of chrome://tracing and Perfetto: a process a stage, a thread a stream."""
    events: list[dict[str, object]] = []
    streams = STREAMS if any(event.stream == BEHIND for event in result.timeline) else STREAMS[:-1]
    for stage in range(len(result.stages)):
        events.append(_metadata("process_name", stage, 0, f"stage {stage}"))
        events += [_metadata("thread_name", stage, thread, name) for thread, name in enumerate(streams)]
    events += [
        {
            "ph": "X",
            "name": event.title,
            "pid": event.stage,
            "tid": STREAMS.index(event.stream),
            "ts": event.start_s * 1e6,
            "dur": (event.end_s - event.start_s) * 1e6,
        }
        for event in result.timeline
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _metadata(name: str, stage: int, thread: int, label: str) -> dict[str, object]:
    return {"ph": "M", "name": name, "pid": stage, "tid": thread, "args": {"name": label}}


def _run_schedule(program: Program, prices: Sequence[StagePrice], receives: Receives, *, told: bool) -> list[Rank]:
    """Run all stages' steps; a stage that has moved wakes its neighbours. told: with what they did."""
    pp, shape = program.pp, (program.pp, program.microbatches, program.virtual_stages, program.window)
    ranks = [
        Rank(stage, price, stage_schedule(program.schedule, stage, *shape), receives, program.window, told=told)
        for stage, price in enumerate(prices)
    ]
    for before in ranks[: pp if program.virtual_stages > 1 else pp - 1]:
        _link(before, ranks[(before.stage + 1) % pp])
    awake = dict.fromkeys(range(pp))
    while awake:
        stage = next(iter(awake))
        del awake[stage]
        if ranks[stage].advance():
            awake |= dict.fromkeys(near for near in ((stage - 1) % pp, (stage + 1) % pp) if near not in awake)
    for rank in ranks:
        if not rank.finished():
            raise VerificationError("deadlock", f"stage {rank.stage} waits forever at {rank.steps[rank.position]}")
        rank.drain()
    return ranks


def _link(before: Rank, after: Rank) -> None:
    """Channels between two neighbours, both ways; from the last stage to the first they join a chunk and the next."""
    chunks, wraps = before.price.chunks, after.stage == 0
    known_s = max(chunk.delay_back_s if chunk.notices else 0.0 for chunk in chunks)
    there = Link(before, "send_forward", [(c.to_next_s, c.delay_s, c.handled_s) for c in chunks], known_s)
    known_s = max(chunk.delay_s if chunk.notices else 0.0 for chunk in chunks)
    senders = [chunks[index - wraps] for index in range(len(chunks))]
    back = Link(after, "send_backward", [(c.from_next_s, c.delay_back_s, c.handled_s) for c in senders], known_s)
    before.links[SendForward] = after.links[RecvForward] = there
    after.links[SendBackward] = before.links[RecvBackward] = back


def _run_step_work(program: Program, runs: Sequence[Sequence[Rank]]) -> None:
    """Once per step: every stage's collectives in its own order, those between stages together; then each stage by
    itself its optimizer and the gathering of its parameters."""
    left = [deque(enumerate(stage.step.reductions)) for stage in program.stages]
    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(left):
            while queue and _reduce_together(program, runs, left, stage):
                moved = True
    stuck = {stage: queue[0][1][0] for stage, queue in enumerate(left) if queue}
    if stuck:
        raise VerificationError("step_collectives", f"stages wait for each other: {stuck}")
    for own in program.stages:
        ranks = [run[own.stage] for run in runs]
        for rank in ranks:
            rank.optimize()
        for index, collective in enumerate(own.step.gathers):
            _meet([[rank] for rank in ranks], collective, [[rank.price.step_gathers_s[index]] for rank in ranks])


def _reduce_together(
    program: Program,
    runs: Sequence[Sequence[Rank]],
    left: list[deque[tuple[int, tuple[Collective, str | None]]]],
    stage: int,
) -> bool:
    """Run a stage's next collective if all stages that take part have come to it."""
    collective, group = left[stage][0][1]
    members = collective_stages(program, collective.axis, stage)
    if any(not left[member] or left[member][0][1][0] != collective for member in members):
        return False
    indices = {member: left[member].popleft()[0] for member in members}
    if group is not None:
        assert members == (stage,), "gradients of one stage"
        _meet_behind([run[stage] for run in runs], collective, group, indices[stage])
        return True
    ranks = [[run[member] for member in members] for run in runs]
    _meet(ranks, collective, [[rank.price.step_collectives_s[indices[rank.stage]] for rank in own] for own in ranks])
    return True


def _meet(ranks: Sequence[Sequence[Rank]], collective: Collective, seconds: Sequence[Sequence[float]]) -> None:
    """A collective of the ranks of each replica: it starts when its last member is there, of all replicas where it
    goes over them."""
    starts = [max(rank.now for rank in own) for own in ranks]
    alone = is_inside_replica(collective.axis) or collective.axis.startswith(TIED)
    for own, start_s, own_s in zip(ranks, starts, seconds, strict=True):
        for rank, rank_s in zip(own, own_s, strict=True):
            rank.reduce(collective, rank_s, start_s if alone else max(starts))


def _meet_behind(ranks: Sequence[Rank], collective: Collective, group: str, index: int) -> None:
    """A collective of a stage over its replicas that begins when the last of them has completed a group."""
    start_s = max(rank.ready_s(collective, group) for rank in ranks)
    for rank in ranks:
        behind_s = rank.price.step_behind_s[index]
        end_s = start_s + rank.price.step_collectives_s[index] - behind_s
        rank.reduced_behind(collective, behind_s, start_s, end_s)


def _slowest(program: Program, runs: Sequence[Sequence[Rank]], crowding: float) -> Sequence[Rank]:
    """The replica that ends last, with each rank's step as it passes where others leave it their cores."""
    ranks = max(runs, key=lambda run: max(rank.now for rank in run))
    if crowding > 1:
        end_s = max(rank.now for rank in ranks)
        waits = [(len(program.ranks(rank.stage)), [*rank.waits, (rank.now, end_s)]) for rank in ranks]
        clock = shared_clock(waits, end_s, crowding)
        for rank in ranks:
            rank.hasten(clock)
    return ranks


def _stage_estimate(program: Program, rank: Rank, memory: MemoryBreakdown) -> StageEstimate:
    return StageEstimate(
        stage=rank.stage,
        forward_s=sum(chunk.forward.total_s for chunk in rank.price.chunks),
        backward_s=sum(block.total_s for chunk in rank.price.chunks for block in chunk.backwards),
        reduce_s=rank.reduction_s,
        optimizer_s=rank.optimizer_s,
        memory=memory,
        op_kinds_s=_kinds(program, rank),
    )


def _memory(program: Program, cluster: PricedCluster, stage: int) -> MemoryBreakdown:
    """Memory under the allocator of the stage's devices; the larger where they are of several kinds."""
    kinds = sorted({cluster.devices[rank].kind for rank in program.ranks(stage)})
    own, shape = program.stages[stage], (program.pp, program.microbatches, program.schedule)
    memories = [stage_memory(own, *shape, allocator_rounding(kind), program.window) for kind in kinds]
    return max(memories, key=lambda memory: memory.total_bytes)


def _kinds(program: Program, rank: Rank) -> dict[str, float]:
    """Seconds per step by op kind; "receive" holds the transfers that this stage waits for."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for chunk in rank.price.chunks:
        for block in (chunk.forward, *chunk.backwards):
            for kind, seconds in block.kinds_s.items():
                kinds[kind] += seconds * program.microbatches
    for kind, seconds in (*rank.reduced_kinds_s.items(), *rank.price.optimizer_kinds_s.items()):
        kinds[kind] += seconds
    if rank.links:
        kinds["receive"] = rank.received_exposed_s
    return dict(kinds)
