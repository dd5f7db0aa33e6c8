"""Transfers between stages: a rank reads what another sends from its memory where it can, else it comes as a message.

Between two ranks each link carries tensors in order. What is sent stays as it is until it has been waited for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.exchange import timeout_of
from autopar.runtime.near import Peer, reach


class Transfer(Protocol):
    """One tensor under way."""

    def advance(self) -> None:
        """Do what can be done without waiting."""

    def wait(self, timeout: timedelta | None) -> None:
        """Until it has arrived, or what is sent may change. Errors: RuntimeError, CollectiveTimeoutError."""


class Transfers:
    """All links of a rank. groups: of each link, the same links for all ranks; peers: the ranks whose memory this one
    reads, and that read its own."""

    def __init__(self, groups: Mapping[str, dist.ProcessGroup | None], peers: Mapping[int, Peer]) -> None:
        self._groups, self._peers = groups, peers
        self._places = {name: place for place, name in enumerate(sorted(groups))}
        self._counts: dict[tuple[str, int, bool], int] = {}

    def send(self, link: str, part: Tensor, target: int) -> Transfer:
        """Begin to send a contiguous tensor."""
        if target not in self._peers:
            return _Message(dist.isend(part, dst=target, group=self._groups[link]))
        return _Offer(self._peers[target], self._number(link, target, sends=True), part)

    def receive(self, link: str, part: Tensor, source: int) -> Transfer:
        """Begin to receive into a contiguous tensor."""
        if source not in self._peers:
            return _Message(dist.irecv(part, src=source, group=self._groups[link]))
        return _Reading(self._peers[source], self._number(link, source, sends=False), part)

    def close(self) -> None:
        """Nothing can be sent any more."""
        for peer in self._peers.values():
            peer.close()

    def _number(self, link: str, peer: int, *, sends: bool) -> int:
        """Of the next tensor that a link carries to or from a rank; both ends count alike."""
        key = (link, peer, sends)
        self._counts[key] = self._counts.get(key, -1) + 1
        return self._counts[key] * len(self._places) + self._places[link]


class _Message:
    """As the backend has it."""

    def __init__(self, work: dist.Work | None) -> None:
        assert work is not None, "this rank is in the group"
        self.work = work

    def advance(self) -> None:
        """The backend's threads do."""

    def wait(self, timeout: timedelta | None) -> None:
        self.work.wait() if timeout is None else self.work.wait(timeout)


class _Offer:
    """What another rank is to read, kept until then; sockets have their own timeout."""

    def __init__(self, peer: Peer, number: int, part: Tensor) -> None:
        self.peer, self.number, self.part = peer, number, part
        peer.offer(number, part)

    def advance(self) -> None:
        """The other rank does."""

    def wait(self, timeout: timedelta | None) -> None:
        self.peer.settle(self.number)


class _Reading:
    """What another rank offers, or will."""

    def __init__(self, peer: Peer, number: int, part: Tensor) -> None:
        self.peer, self.number, self.part = peer, number, part
        self.is_done = False

    def advance(self) -> None:
        if not self.is_done and self.peer.has_offered(self.number):
            self.wait(None)

    def wait(self, timeout: timedelta | None) -> None:
        if not self.is_done:
            self.peer.take(self.number, self.part)
            self.is_done = True


def connect_stages(
    groups: Mapping[str, dist.ProcessGroup | None], others: Collection[int], device: torch.device
) -> Transfers:
    """With the ranks that this one sends to or receives from; all ranks of a pipeline ask for it together."""
    world = dist.group.WORLD
    if device.type != "cpu" or not others:
        return Transfers(groups, {})
    assert world is not None
    return Transfers(groups, reach(world, others, timeout_of(world)))
