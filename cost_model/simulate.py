"""Simulate one step of a program: each stage's streams, event by event.

By symmetry one rank stands for all ranks of a stage; where devices or links differ, for those of one replica. A
transfer begins when both ends have posted it (gloo and NCCL both move data only then), occupies no compute of the
sender, and holds the receiver, whose receive blocks where it stands. Collectives block. Nothing overlaps that the
runtime does not overlap.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cost_model.axes import is_inside_replica
from cost_model.collector import collector_paused
from cost_model.egress import Egress
from cost_model.errors import VerificationError
from cost_model.estimate import Estimate, MemoryBreakdown, StageEstimate, TimeBreakdown
from cost_model.memory import allocator_rounding, stage_memory
from cost_model.plan import Plan
from cost_model.prices import TIED, BlockPrice, PricedCluster, StagePrice, collective_stages, price_replicas
from cost_model.program import Collective, Program
from cost_model.schedule import (
    POSTS,
    Backward,
    Forward,
    RecvBackward,
    RecvForward,
    SendBackward,
    SendForward,
    Step,
    Weight,
    stage_schedule,
)

_POSTED: dict[type[Step], type[Step]] = {post: receive for receive, post in POSTS.items()}
_COMPUTE: dict[type[Step], str] = {Forward: "forward", Backward: "backward", Weight: "weight"}
BEHIND = "behind"
STREAMS = ("compute", "receive", "send_forward", "send_backward", BEHIND)


class Event(NamedTuple):
    """Something a stage did: seconds from the start of the step; microbatch -1 for work done once per step."""

    stage: int
    stream: str
    name: str
    microbatch: int
    start_s: float
    end_s: float
    chunk: int = 0

    @property
    def title(self) -> str:
        """As traces show it."""
        return event_title(self.name, self.microbatch, self.chunk)


def event_title(name: str, microbatch: int, chunk: int) -> str:
    """ "forward 3" of a stage's first chunk, "forward 3, chunk 1" of another."""
    if microbatch < 0:
        return name
    return f"{name} {microbatch}, chunk {chunk}" if chunk else f"{name} {microbatch}"


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
) -> SimulationResult:
    """Time and memory of one step of this very program.

    driving_s: what starting a step and collecting its loss costs, counted as ``other``. streams: as runtimes do that
    give each rank one stream for sends and one for receives (not autopar's): both run through their messages in
    program order, ahead of the compute that needs them, and a message moves once it is at the head of both. blocking:
    as runtimes do that post a receive only where they need the message. memories: of each stage, where they are known.
    Raises VerificationError with check "deadlock" or "step_collectives" if ranks wait for each other forever.
    """
    assert len(program.stages) == program.pp and len(program.devices) == program.num_devices
    replicas = _run(program, price_replicas(program, cluster), _mode(streams, blocking))
    ranks = max(replicas, key=lambda replica: max(rank.now for rank in replica))
    last = max(ranks, key=lambda rank: rank.now)
    return SimulationResult(
        step_time_s=last.now + driving_s,
        stages=tuple(
            _stage_estimate(program, rank, memories[rank.stage] if memories else _memory(program, cluster, rank.stage))
            for rank in ranks
        ),
        breakdown=last.breakdown(driving_s),
        timeline=tuple(event for rank in ranks for event in rank.events),
    )


def step_time_s(
    program: Program, prices: Sequence[StagePrice], *, streams: bool = False, blocking: bool = False
) -> float:
    """Seconds of one step at given prices of its stages; as ``simulate``, without memory and timeline."""
    return max(rank.now for rank in _run(program, (prices,), _mode(streams, blocking))[0])


class _Receives(enum.Enum):
    """When a receive begins: before the block that runs before it, where it stands, or in the order of a stream."""

    EARLY = enum.auto()
    BLOCKING = enum.auto()
    STREAMS = enum.auto()


def _mode(streams: bool, blocking: bool) -> _Receives:
    assert not (streams and blocking)
    return _Receives.STREAMS if streams else _Receives.BLOCKING if blocking else _Receives.EARLY


def _run(program: Program, replicas: Sequence[Sequence[StagePrice]], receives: _Receives) -> list[list[_Rank]]:
    """The ranks of each replica that differs from the others."""
    runs = [_run_schedule(program, prices, receives) for prices in replicas]
    _run_step_work(program, runs)
    return runs


def estimate_program(
    program: Program,
    cluster: PricedCluster,
    plan: Plan,
    notes: Sequence[str],
    search_s: float,
    gap: float,
    *,
    driving_s: float = 0.0,
    memories: Sequence[MemoryBreakdown] = (),
) -> Estimate:
    """Simulate a program and put the figures beside the plan it was made from; ``memories``: as for ``simulate``."""
    result = simulate(program, cluster, driving_s=driving_s, memories=memories)
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


class _Link:
    """Messages one way between neighbours: when each was posted and called for, and when each arrived.

    prices: by the sender's chunk, the seconds of a transfer and the part of them that keeps no stream busy.
    notice_s: from a receiver's call to the moment when the sender knows of it.
    """

    def __init__(self, sender: _Rank, stream: str, prices: Sequence[tuple[float, float]], notice_s: float) -> None:
        self.sender, self.stream, self.prices, self.notice_s = sender, stream, prices, notice_s
        self.posted: list[float] = []
        self.sends: list[Step] = []
        self.called: list[float] = []
        self.done: list[float] = []
        self.taken = 0

    def post(self, at_s: float, step: Step) -> None:
        self.posted.append(at_s)
        self.sends.append(step)
        self.move()

    def move(self) -> None:
        """Messages that both ends know of."""
        while len(self.done) < min(len(self.posted), len(self.called)):
            message, sender = len(self.done), self.sender
            step = self.sends[message]
            known = max(self.posted[message], self.called[message] + self.notice_s, self.free_s())
            delay_s = self.delay_s(message)
            start, left = sender.egress.send(known, self.transfer_s(message) - delay_s)
            end = left + delay_s
            self.done.append(end)
            sender.events.append(Event(sender.stage, self.stream, "send", step.microbatch, start, end, step.chunk))

    def free_s(self) -> float:
        """When the last message has left."""
        return self.done[-1] - self.delay_s(len(self.done) - 1) if self.done else 0.0

    def transfer_s(self, message: int) -> float:
        return self.prices[self.sends[message].chunk][0]

    def delay_s(self, message: int) -> float:
        return self.prices[self.sends[message].chunk][1]


class _Rank:
    """The representative rank of one stage: its clock, where its time went, and its place in its list of steps."""

    def __init__(self, stage: int, price: StagePrice, steps: Sequence[Step], receives: _Receives, window: int) -> None:
        self.stage, self.price, self.steps, self.receives, self.window = stage, price, steps, receives, window
        self.received_s = self.received_exposed_s = 0.0
        self.egress = Egress(price.shares_egress)
        self.position = 0
        self.now = self.compute_s = self.communication_s = self.bubble_s = 0.0
        self.reduction_s = self.optimizer_s = 0.0
        self.completed_s: dict[str, float] = {}
        self.free_s: dict[str, float] = {}
        self.reduced_kinds_s: defaultdict[str, float] = defaultdict(float)
        self.events: list[Event] = []
        self.links: dict[type[Step], _Link] = {}

    def advance(self) -> bool:
        """Run steps until one must wait for a neighbour; whether any was run."""
        before = self.position
        while self.position < len(self.steps) and self._run(self.steps[self.position]):
            self.position += 1
        return self.position > before

    def finished(self) -> bool:
        return self.position == len(self.steps)

    def drain(self) -> None:
        """Wait for the last send each way."""
        for kind in (SendForward, SendBackward):
            link = self.links.get(kind)
            if link is not None and link.done:
                self._wait(link.done[-1], link.transfer_s(len(link.done) - 1))

    def reduce(self, collective: Collective, seconds: float, start_s: float) -> None:
        """Take part in a collective of the step that starts when its last member is there."""
        self.bubble_s += start_s - self.now
        self.now = start_s + seconds
        self.reduction_s += seconds
        self.reduced_kinds_s[collective.kind] += seconds
        name = f"{collective.kind} {collective.axis}"
        self.events.append(Event(self.stage, "compute", name, -1, start_s, self.now))

    def reduced_behind(self, collective: Collective, behind_s: float, start_s: float, end_s: float) -> None:
        """Wait for a collective of the step that has begun behind the last backward."""
        self.free_s[collective.axis] = end_s
        name = f"{collective.kind} {collective.axis}"
        self.events.append(Event(self.stage, BEHIND, name, -1, start_s, end_s))
        until_s = max(self.now, end_s) + behind_s
        if until_s > self.now:
            self.events.append(Event(self.stage, "compute", name, -1, self.now, until_s))
        self.reduction_s += until_s - self.now
        self.reduced_kinds_s[collective.kind] += until_s - self.now
        self.now = until_s

    def ready_s(self, collective: Collective, group: str) -> float:
        """When a collective can begin whose gradients are those of a group."""
        return max(self.completed_s[group], self.free_s.get(collective.axis, 0.0))

    def optimize(self) -> None:
        end = self.now + self.price.optimizer_s
        self.optimizer_s = self.price.optimizer_s
        self.events.append(Event(self.stage, "compute", "optimizer", -1, self.now, end))
        self.now = end

    def breakdown(self, driving_s: float) -> TimeBreakdown:
        return TimeBreakdown(
            compute_s=self.compute_s,
            communication_s=self.communication_s,
            bubble_s=self.bubble_s,
            reduction_s=self.reduction_s,
            optimizer_s=self.optimizer_s,
            other_s=driving_s,
        )

    def _run(self, step: Step) -> bool:
        kind = type(step)
        if kind in _COMPUTE:
            self._compute(step)
            return True
        if kind is SendForward or kind is SendBackward:
            return self._send(self.links[kind], step)
        if kind in _POSTED:
            if self.receives is _Receives.EARLY:
                self._expect(self.links[_POSTED[kind]])
            return True
        return self._receive(self.links[kind], step)

    def _compute(self, step: Step) -> None:
        name = _COMPUTE[type(step)]
        price: BlockPrice = getattr(self.price.chunks[step.chunk], name)
        end = self.now + price.compute_s + price.communication_s
        self.completed_s |= {group: self.now + seconds for group, seconds in price.completed_s.items()}
        self.compute_s += price.compute_s
        self.communication_s += price.communication_s
        self.events.append(Event(self.stage, "compute", name, step.microbatch, self.now, end, step.chunk))
        self.now = end

    def _send(self, link: _Link, step: Step) -> bool:
        """Wait until fewer than a window of sends are under way on this link, then post."""
        if self.receives is _Receives.STREAMS:
            return self._post(link, step)
        before = len(link.posted) - self.window
        if before >= len(link.done):
            return False
        if before >= 0:
            self._wait(link.done[before], link.transfer_s(before))
        link.post(self.now, step)
        return True

    def _expect(self, link: _Link) -> None:
        link.called.append(self.now)
        link.move()

    def _post(self, link: _Link, step: Step) -> bool:
        """Queue on the send stream, which runs through the sends of both directions."""
        own = [other for kind, other in self.links.items() if kind in (SendForward, SendBackward)]
        if any(len(other.posted) > len(other.done) for other in own):
            return False
        link.post(max([self.now, *(other.free_s() for other in own)]), step)
        return True

    def _receive(self, link: _Link, step: Step) -> bool:
        message = link.taken
        if message == len(link.posted):
            return False
        if self.receives is not _Receives.EARLY:
            link.called.append(self.received_s if self.receives is _Receives.STREAMS else self.now)
            link.move()
        end = link.done[message]
        link.taken += 1
        self.received_s = end - link.delay_s(message)
        called = link.called[message]
        self.events.append(Event(self.stage, "receive", "receive", step.microbatch, called, end, step.chunk))
        self.received_exposed_s += self._wait(end, link.transfer_s(message))
        return True

    def _wait(self, until_s: float, transfer_s: float) -> float:
        """Stand still: the length of a transfer is communication, what is beyond it waiting for the other stage.

        Returns the former.
        """
        waited = max(0.0, until_s - self.now)
        exposed = min(waited, transfer_s)
        self.communication_s += exposed
        self.bubble_s += waited - exposed
        self.now = max(self.now, until_s)
        return exposed


def _run_schedule(program: Program, prices: Sequence[StagePrice], receives: _Receives) -> list[_Rank]:
    """Run all stages' steps; a stage that has moved wakes its neighbours."""
    pp, shape = program.pp, (program.pp, program.microbatches, program.virtual_stages, program.window)
    ranks = [
        _Rank(stage, price, stage_schedule(program.schedule, stage, *shape), receives, program.window)
        for stage, price in enumerate(prices)
    ]
    for before in ranks[: pp if program.virtual_stages > 1 else pp - 1]:
        _link(before, ranks[(before.stage + 1) % pp])
    awake = deque(range(pp))
    while awake:
        stage = awake.popleft()
        if ranks[stage].advance():
            awake.extend(near for near in dict.fromkeys(((stage - 1) % pp, (stage + 1) % pp)) if near not in awake)
    for rank in ranks:
        if not rank.finished():
            raise VerificationError("deadlock", f"stage {rank.stage} waits forever at {rank.steps[rank.position]}")
        rank.drain()
    return ranks


def _link(before: _Rank, after: _Rank) -> None:
    """Channels between two neighbours, both ways; from the last stage to the first they join a chunk and the next."""
    chunks, wraps = before.price.chunks, after.stage == 0
    notice_s = max(chunk.notice_s for chunk in chunks)
    there = _Link(before, "send_forward", [(chunk.to_next_s, chunk.delay_s) for chunk in chunks], notice_s)
    senders = [chunks[index - wraps] for index in range(len(chunks))]
    back = _Link(after, "send_backward", [(chunk.from_next_s, chunk.delay_s) for chunk in senders], notice_s)
    before.links[SendForward] = after.links[RecvForward] = there
    after.links[SendBackward] = before.links[RecvBackward] = back


def _run_step_work(program: Program, runs: Sequence[Sequence[_Rank]]) -> None:
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
    runs: Sequence[Sequence[_Rank]],
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


def _meet(ranks: Sequence[Sequence[_Rank]], collective: Collective, seconds: Sequence[Sequence[float]]) -> None:
    """A collective of the ranks of each replica: it starts when its last member is there, of all replicas where it
    goes over them."""
    starts = [max(rank.now for rank in own) for own in ranks]
    alone = is_inside_replica(collective.axis) or collective.axis.startswith(TIED)
    for own, start_s, own_s in zip(ranks, starts, seconds, strict=True):
        for rank, rank_s in zip(own, own_s, strict=True):
            rank.reduce(collective, rank_s, start_s if alone else max(starts))


def _meet_behind(ranks: Sequence[_Rank], collective: Collective, group: str, index: int) -> None:
    """A collective of a stage over its replicas that begins when the last of them has completed a group."""
    start_s = max(rank.ready_s(collective, group) for rank in ranks)
    for rank in ranks:
        behind_s = rank.price.step_behind_s[index]
        end_s = start_s + rank.price.step_collectives_s[index] - behind_s
        rank.reduced_behind(collective, behind_s, start_s, end_s)


def _stage_estimate(program: Program, rank: _Rank, memory: MemoryBreakdown) -> StageEstimate:
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


def _kinds(program: Program, rank: _Rank) -> dict[str, float]:
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
