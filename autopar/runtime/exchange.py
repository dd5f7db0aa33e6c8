"""How the ranks of a group exchange tensors: by messages, by reading each other's memory, or as the backend does.

Every collective is begun and ended: ``begin_*`` returns what ends it. Operands stay as they are until then, those of a
gather until ``settle``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.faults import named_faults
from autopar.runtime.near import connect

Awaited = tuple[dist.Work | None, int]
"""A message under way, and the place in the group of the rank at the other end."""
End = Callable[[], None]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_gather_native: Callable[..., dist.Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_native: Callable[..., dist.Work] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange(Protocol):
    """Collectives of one group over flat tensors."""

    def begin_all_reduce(self, x: Tensor, op: str) -> End:
        """``x`` is overwritten by its reduction."""

    def begin_gather(self, whole: Tensor, part: Tensor) -> End:
        """``whole``: the parts of all ranks in order; ``part`` may lie in its place there."""

    def gather(self, whole: Tensor, part: Tensor) -> None:
        """The same at once; nobody reads ``part`` after it. What has begun before may still be on its way."""

    def begin_scatter(self, out: Tensor, x: Tensor, arriving: Tensor) -> End:
        """``out``: this rank's part of the sum of ``x``; it may lie in ``x`` or at the beginning of ``arriving``, which
        is memory for what other ranks send: all of ``x`` but a part."""

    def settle(self) -> None:
        """Wait until nobody reads what this rank has given to gathers."""

    def close(self) -> None:
        """No collective can be begun any more."""


class Native:
    """As the backend has them."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def begin_all_reduce(self, x: Tensor, op: str) -> End:
        return _waiting(dist.all_reduce(x, op=_OPS[op], group=self.group, async_op=True))

    def begin_gather(self, whole: Tensor, part: Tensor) -> End:
        return _waiting(_gather_native(whole, part, group=self.group, async_op=True))

    def gather(self, whole: Tensor, part: Tensor) -> None:
        self.begin_gather(whole, part)()

    def begin_scatter(self, out: Tensor, x: Tensor, arriving: Tensor) -> End:
        return _waiting(_scatter_native(out, x, group=self.group, async_op=True))

    def settle(self) -> None:
        """Done where they end."""

    def close(self) -> None:
        """Nothing is held."""


class Messages:
    """Of CPU ranks, made of sends and receives: what gloo's own do with more copies and more waiting.

    Measured on two ranks of one machine, 3 MB a rank: a gather takes two thirds of gloo's time, a reduction that leaves
    each rank its part under half of an ``all_to_all`` and a sum (gloo's ``reduce_scatter`` is an ``all_reduce`` of a
    copy). Parts of a sum go straight to the rank whose they are, those of a gather around a ring, of which only the
    first round moves before it is ended.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def begin_all_reduce(self, x: Tensor, op: str) -> End:
        return Native(self.group).begin_all_reduce(x, op)

    def begin_gather(self, whole: Tensor, part: Tensor) -> End:
        parts = whole.view(self.size, -1)
        works = self._pass_on(parts, part.view(-1), 1)
        if parts[self.rank].data_ptr() != part.data_ptr():
            parts[self.rank].copy_(part.view(-1))

        def end() -> None:
            self._wait(works)
            for step in range(2, self.size):
                self._wait(self._pass_on(parts, parts[(self.rank - step + 1) % self.size], step))

        return end

    def gather(self, whole: Tensor, part: Tensor) -> None:
        self.begin_gather(whole, part)()

    def begin_scatter(self, out: Tensor, x: Tensor, arriving: Tensor) -> End:
        parts, rows = x.view(self.size, -1), arriving.view(self.size - 1, -1)
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        works = [self._receive(row, k) for k, row in zip(others, rows, strict=True)]
        works += [self._send(parts[k], k) for k in others]

        def end() -> None:
            self._wait(works)
            total = parts[self.rank]
            for row in rows:
                total = torch.add(total, row, out=out)

        return end

    def settle(self) -> None:
        """Done where they end."""

    def close(self) -> None:
        """Nothing is held."""

    def _pass_on(self, parts: Tensor, leaving: Tensor, step: int) -> list[Awaited]:
        """A round of the ring: a part to the next rank, and one from the rank before."""
        arriving = parts[(self.rank - step) % self.size]
        return [
            self._receive(arriving, (self.rank - 1) % self.size),
            self._send(leaving, (self.rank + 1) % self.size),
        ]

    def _receive(self, part: Tensor, source: int) -> Awaited:
        with self._waiting_for(source):
            return dist.irecv(part, group=self.group, group_src=source), source

    def _send(self, part: Tensor, target: int) -> Awaited:
        with self._waiting_for(target):
            return dist.isend(part, group=self.group, group_dst=target), target

    def _wait(self, works: list[Awaited]) -> None:
        """As long as the group waits in collectives; by themselves messages wait as long as it did when it was made."""
        timeout = timeout_of(self.group)
        for work, other in works:
            assert work is not None, "this rank is in the group"
            with self._waiting_for(other):
                work.wait(timeout)

    def _waiting_for(self, other: int) -> AbstractContextManager[None]:
        """Errors that name the rank at the other end."""
        own, peer = (dist.get_global_rank(self.group, place) for place in (self.rank, other))
        return named_faults(own, timeout_of(self.group).total_seconds(), lambda: peer)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long collectives of CPU ranks wait."""
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def exchange_of(group: dist.ProcessGroup | None, device: torch.device) -> Exchange:
    """The fastest way that a group has; its ranks ask for it together, with tensors of one kind of device.

    None is the group of all ranks, whose sum of the loss ends every step: through gloo it took 0.4 to 6 ms after some
    milliseconds of computing, since its threads have to be given a core first, and 0.04 ms between ranks that read
    each other's memory.
    """
    if device.type != "cpu":
        return Native(group)
    members = dist.group.WORLD if group is None else group
    assert members is not None, "this rank has joined the others"
    return connect(members, timeout_of(members)) or Messages(members)


def _waiting(work: dist.Work | None) -> End:
    assert work is not None, "this rank is in the group"

    def end() -> None:
        work.wait()

    return end
