"""The clock of one rank in a simulated step: what it computes, sends and waits for, instruction by instruction."""

from __future__ import annotations

import enum
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cost_model.block_price import BlockPrice
from cost_model.egress import Egress
from cost_model.estimate import TimeBreakdown
from cost_model.prices import StagePrice
from cost_model.program import Collective
from cost_model.schedule import (
    POSTS,
    Backward,
    Forward,
    SendBackward,
    SendForward,
    Step,
    Weight,
)
from cost_model.shared_cores import SharedClock, Span

POSTED: dict[type[Step], type[Step]] = {post: receive for receive, post in POSTS.items()}
SENDS = (SendForward, SendBackward)
COMPUTE: dict[type[Step], str] = {Forward: "forward", Backward: "backward", Weight: "weight"}
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


class Receives(enum.Enum):
    """When a receive begins: before the block that runs before it, where it stands, or in the order of a stream."""

    EARLY = enum.auto()
    BLOCKING = enum.auto()
    STREAMS = enum.auto()


class Link:
    """Messages one way between neighbours: when each was posted and called for, and when each arrived.

    prices: by the sender's chunk, the seconds of a transfer, the part of them that keeps no stream busy, and what a
    rank spends on sending one and receiving one.
    notice_s: from a receiver's call to the moment when the sender knows of it. free_s: when the last message has left.
    """

    def __init__(
        self, sender: Rank, stream: str, prices: Sequence[tuple[float, float, float]], notice_s: float
    ) -> None:
        self.sender, self.stream, self.prices, self.notice_s = sender, stream, prices, notice_s
        self.posted: list[float] = []
        self.sends: list[Step] = []
        self.called: list[float] = []
        self.done: list[float] = []
        self.taken = 0
        self.free_s = 0.0

    def post(self, at_s: float, step: Step) -> None:
        self.posted.append(at_s)
        self.sends.append(step)
        if len(self.called) >= len(self.posted):
            self._move()

    def call(self, at_s: float) -> None:
        self.called.append(at_s)
        if len(self.posted) >= len(self.called):
            self._move()

    def _move(self) -> None:
        """The next message, of which both ends know now."""
        message, sender = len(self.done), self.sender
        step = self.sends[message]
        known = max(self.posted[message], self.called[message] + self.notice_s, self.free_s)
        transfer_s, delay_s, _ = self.prices[step.chunk]
        start, left = sender.egress.send(known, transfer_s - delay_s)
        end = left + delay_s
        self.done.append(end)
        self.free_s = end - delay_s
        if sender.events is not None:
            sender.tell(self.stream, "send", step.microbatch, start, end, step.chunk)

    def transfer_s(self, message: int) -> float:
        return self.prices[self.sends[message].chunk][0]

    def delay_s(self, message: int) -> float:
        return self.prices[self.sends[message].chunk][1]

    def handled_s(self, message: int) -> float:
        return self.prices[self.sends[message].chunk][2]


class Rank:
    """The representative rank of one stage: its clock, where its time went, and its place in its list of steps.

    events: what it did, None where nobody asks: writing them down takes as long as all else. waits: for other stages.
    pace: what it did took so many times its seconds.
    """

    def __init__(
        self,
        stage: int,
        price: StagePrice,
        steps: Sequence[Step],
        receives: Receives,
        window: int,
        *,
        told: bool = True,
    ) -> None:
        self.stage, self.price, self.steps, self.receives, self.window = stage, price, steps, receives, window
        self.received_s = self.received_exposed_s = 0.0
        self.egress = Egress(price.shares_egress)
        self.position = 0
        self.now = self.compute_s = self.communication_s = self.bubble_s = 0.0
        self.reduction_s = self.optimizer_s = 0.0
        self.completed_s: dict[str, float] = {}
        self.free_s: dict[str, float] = {}
        self.reduced_kinds_s: defaultdict[str, float] = defaultdict(float)
        self.events: list[Event] | None = [] if told else None
        self.links: dict[type[Step], Link] = {}
        self.waits: list[Span] = []
        self.pace = 1.0

    def tell(self, stream: str, name: str, microbatch: int, start_s: float, end_s: float, chunk: int = 0) -> None:
        """Write an event down, where any are."""
        if self.events is not None:
            self.events.append(Event(self.stage, stream, name, microbatch, start_s, end_s, chunk))

    def advance(self) -> bool:
        """Run steps until one must wait for a neighbour; whether any was run."""
        before, steps, run = self.position, self.steps, self._runs
        position, count = before, len(self.steps)
        while position < count and run[type(steps[position])](steps[position]):
            position += 1
        self.position = position
        return position > before

    def finished(self) -> bool:
        return self.position == len(self.steps)

    def drain(self) -> None:
        """Wait for the last send each way."""
        for kind in SENDS:
            link = self.links.get(kind)
            if link is not None and link.done:
                self._wait(link.done[-1], link.transfer_s(len(link.done) - 1))

    def reduce(self, collective: Collective, seconds: float, start_s: float) -> None:
        """Take part in a collective of the step that starts when its last member is there."""
        self._idle(start_s)
        self.now = start_s + seconds
        self.reduction_s += seconds
        self.reduced_kinds_s[collective.kind] += seconds
        name = f"{collective.kind} {collective.axis}"
        self.tell("compute", name, -1, start_s, self.now)

    def reduced_behind(self, collective: Collective, behind_s: float, start_s: float, end_s: float) -> None:
        """Wait for a collective of the step that has begun behind the last backward."""
        self.free_s[collective.axis] = end_s
        name = f"{collective.kind} {collective.axis}"
        self.tell(BEHIND, name, -1, start_s, end_s)
        until_s = max(self.now, end_s) + behind_s
        if until_s > self.now:
            self.tell("compute", name, -1, self.now, until_s)
        self.reduction_s += until_s - self.now
        self.reduced_kinds_s[collective.kind] += until_s - self.now
        self.now = until_s

    def ready_s(self, collective: Collective, group: str) -> float:
        """When a collective can begin whose gradients are those of a group."""
        return max(self.completed_s[group], self.free_s.get(collective.axis, 0.0))

    def optimize(self) -> None:
        end = self.now + self.price.optimizer_s
        self.optimizer_s = self.price.optimizer_s
        self.tell("compute", "optimizer", -1, self.now, end)
        self.now = end

    def hasten(self, clock: SharedClock) -> None:
        """Its step as it passes where ranks share cores: what it did is faster by as much as the rest of the time."""
        end_s, waited_s, busy_s = clock(self.now), clock.length_s(self.waits), self.now - self.bubble_s
        self.pace = (end_s - waited_s) / busy_s if busy_s else 1.0
        self.bubble_s, self.now = waited_s, end_s
        if self.events is not None:
            self.events = [e._replace(start_s=clock(e.start_s), end_s=clock(e.end_s)) for e in self.events]

    def breakdown(self, driving_s: float) -> TimeBreakdown:
        return TimeBreakdown(
            compute_s=self.pace * self.compute_s,
            communication_s=self.pace * self.communication_s,
            bubble_s=self.bubble_s,
            reduction_s=self.pace * self.reduction_s,
            optimizer_s=self.pace * self.optimizer_s,
            other_s=driving_s,
        )

    @functools.cached_property
    def _runs(self) -> dict[type[Step], Callable[[Step], bool]]:
        """What each kind of step does, and whether it could; asked for once the rank has its links."""
        runs: dict[type[Step], Callable[[Step], bool]] = {kind: self._computing(name) for kind, name in COMPUTE.items()}
        for kind, link in self.links.items():
            runs[kind] = self._sending(link) if kind in SENDS else self._receiving(link)
        for post, receive in POSTED.items():
            if receive in self.links:
                runs[post] = functools.partial(self._expect, self.links[receive])
        return runs

    def _computing(self, name: str) -> Callable[[Step], bool]:
        """Runs a block of a chunk, by name."""
        prices: list[BlockPrice] = [getattr(chunk, name) for chunk in self.price.chunks]

        def compute(step: Step) -> bool:
            price, now = prices[step.chunk], self.now
            self.now = now + price.compute_s + price.communication_s
            if price.completed_s:
                self.completed_s |= {group: now + seconds for group, seconds in price.completed_s.items()}
            self.compute_s += price.compute_s
            self.communication_s += price.communication_s
            if self.events is not None:
                self.tell("compute", name, step.microbatch, now, self.now, step.chunk)
            return True

        return compute

    def _sending(self, link: Link) -> Callable[[Step], bool]:
        """Waits until fewer than a window of sends are under way on a link, then posts."""
        if self.receives is Receives.STREAMS:
            return functools.partial(self._post, link)
        posted, done, window = link.posted, link.done, self.window

        def send(step: Step) -> bool:
            before = len(posted) - window
            if before >= 0:
                if before >= len(done):
                    return False
                if done[before] > self.now:
                    self._wait(done[before], link.transfer_s(before))
            link.post(self.now, step)
            return True

        return send

    def _expect(self, link: Link, _: Step) -> bool:
        """Post a receive, where those begin before they are needed."""
        if self.receives is Receives.EARLY:
            link.call(self.now)
        return True

    def _post(self, link: Link, step: Step) -> bool:
        """Queue on the send stream, which runs through the sends of both directions."""
        own = [other for kind, other in self.links.items() if kind in SENDS]
        if any(len(other.posted) > len(other.done) for other in own):
            return False
        link.post(max([self.now, *(other.free_s for other in own)]), step)
        return True

    def _receiving(self, link: Link) -> Callable[[Step], bool]:
        """Waits for a message, which it calls for first unless that was done before."""
        posted, done, early = link.posted, link.done, self.receives is Receives.EARLY
        is_handled = any(handled_s for _, _, handled_s in link.prices)

        def receive(step: Step) -> bool:
            message = link.taken
            if message == len(posted):
                return False
            if not early:
                link.call(self.received_s if self.receives is Receives.STREAMS else self.now)
            end = done[message]
            link.taken += 1
            self.received_s = end - link.delay_s(message)
            if self.events is not None:
                self.tell("receive", "receive", step.microbatch, link.called[message], end, step.chunk)
            until_s = max(end, self.now + link.handled_s(message)) if is_handled else end
            if until_s > self.now:
                self.received_exposed_s += self._wait(until_s, link.transfer_s(message))
            return True

        return receive

    def _wait(self, until_s: float, transfer_s: float) -> float:
        """Stand still: the length of a transfer is communication, what is beyond it waiting for the other stage.

        Returns the former.
        """
        waited = max(0.0, until_s - self.now)
        exposed = min(waited, transfer_s)
        self.communication_s += exposed
        self._idle(self.now + waited - exposed)
        self.now = max(self.now, until_s)
        return exposed

    def _idle(self, until_s: float) -> None:
        """Wait for another stage."""
        if until_s > self.now:
            self.bubble_s += until_s - self.now
            self.waits.append((self.now, until_s))
