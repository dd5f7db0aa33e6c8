"""1F1B as Megatron-LM runs it: sends and receives of neighbours in one blocking exchange.

Megatron-LM megatron/schedules.py and p2p_communication.py, version of April 2022: a stage posts what it sends and what
it receives at that point together, and goes on when all of it is done.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Message = tuple[int, int]  # from stage, to stage


@dataclass(frozen=True)
class Exchange:
    """Messages that one stage posts together."""

    messages: tuple[Message, ...]


Work = float | Exchange


def blocking_1f1b_s(
    blocks_s: Sequence[tuple[float, float]], transfers_s: dict[Message, float], microbatches: int, *, held: bool = False
) -> float:
    """Seconds of the schedule; blocks_s: forward and backward of each stage, transfers_s: between neighbours.

    held: whether buffers hold a whole message, so that it leaves before the receiver asks for it.
    """
    pp = len(blocks_s)
    stages = [_Stage(list(_work(stage, pp, microbatches, *blocks_s[stage])), held) for stage in range(pp)]
    posted: defaultdict[Message, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    awake = deque(range(pp))
    while awake:
        stage = awake.popleft()
        for near in stages[stage].advance(stage, posted, transfers_s):
            awake.append(near)
    assert all(stage.finished for stage in stages)
    return max(stage.now for stage in stages)


def _work(stage: int, pp: int, microbatches: int, forward_s: float, backward_s: float) -> Iterator[Work]:
    """Warm-up forwards, pairs of forward and backward, the backwards left."""
    before, after = (stage - 1, stage), (stage, stage + 1)
    first, last = stage == 0, stage == pp - 1
    warmup = min(pp - 1 - stage, microbatches)
    steady = microbatches - warmup
    for _ in range(warmup):
        yield from () if first else (Exchange((before,)),)
        yield forward_s
        yield Exchange((after,))
    yield from () if first or not steady else (Exchange((before,)),)
    for index in range(steady):
        yield forward_s
        yield from () if last else (Exchange((after, after[::-1])),)
        yield backward_s
        if not first:
            yield Exchange((before[::-1],) if index == steady - 1 else (before[::-1], before))
    for _ in range(warmup):
        yield Exchange((after[::-1],))
        yield backward_s
        yield from () if first else (Exchange((before[::-1],)),)


class _Stage:
    def __init__(self, work: list[Work], held: bool) -> None:
        self.work, self.held, self.position, self.now = work, held, 0, 0.0
        self.mine: list[tuple[Message, int]] = []

    @property
    def finished(self) -> bool:
        return self.position == len(self.work)

    def advance(
        self,
        stage: int,
        posted: defaultdict[Message, tuple[list[float], list[float]]],
        transfers_s: dict[Message, float],
    ) -> list[int]:
        """Run until an exchange must wait; the stages that this one posted for. A message is sent when both ends have
        posted it."""
        woken: list[int] = []
        while not self.finished:
            item = self.work[self.position]
            if isinstance(item, float):
                self.now += item
            else:
                if not self.mine:
                    woken += self._post(stage, item, posted)
                ends = [self._end(stage, message, number, posted, transfers_s) for message, number in self.mine]
                if None in ends:
                    return woken
                self.now, self.mine = max(end for end in ends if end is not None), []
            self.position += 1
        return woken

    def _post(
        self, stage: int, item: Exchange, posted: defaultdict[Message, tuple[list[float], list[float]]]
    ) -> list[int]:
        for message in item.messages:
            side = posted[message][int(message[1] == stage)]
            side.append(self.now)
            self.mine.append((message, len(side) - 1))
        return [message[0] if message[1] == stage else message[1] for message in item.messages]

    def _end(
        self,
        stage: int,
        message: Message,
        number: int,
        posted: defaultdict[Message, tuple[list[float], list[float]]],
        transfers_s: dict[Message, float],
    ) -> float | None:
        sent, received = posted[message]
        if self.held and message[0] == stage:
            return sent[number]
        if len(sent) <= number or len(received) <= number:
            return None
        if self.held:
            return max(sent[number] + transfers_s[message], received[number])
        return max(sent[number], received[number]) + transfers_s[message]
