"""Ranks as threads of this process: the real executor and the real programs, with collectives over shared memory.

A step takes milliseconds and needs no process group, so that hundreds of plans can be run. Real ranks differ from
these in their transport alone.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import autopar.ranks
from autopar.runtime import executor, held
from autopar.runtime.comm import Begun, Comm, _join, _parts

TIMEOUT_S = 60.0
LOSSES = ("step", "accumulate", "evaluate")


class Wires:
    """What the ranks of one program share: a meeting place per group, a queue per sender, receiver and direction."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.meetings: dict[tuple[str, tuple[int, ...]], tuple[threading.Barrier, list[Any]]] = {}
        self.queues: dict[tuple[int, int, str], queue.Queue[Tensor]] = {}

    def exchange(
        self, axis: str, ranks: Sequence[int], rank: int, value: Tensor, read: Callable[..., Tensor]
    ) -> Tensor:
        """``read`` of the values of all ranks of a group, in axis order; nobody goes on before all have read."""
        with self.lock:
            new = (threading.Barrier(len(ranks)), [None] * len(ranks))
            barrier, slots = self.meetings.setdefault((axis, tuple(ranks)), new)
        slots[ranks.index(rank)] = value
        barrier.wait(TIMEOUT_S)
        result = read(list(slots))
        barrier.wait(TIMEOUT_S)
        return result

    def wire(self, source: int, target: int, direction: str) -> queue.Queue[Tensor]:
        with self.lock:
            return self.queues.setdefault((source, target, direction), queue.Queue())

    def abort(self) -> None:
        """A rank failed: the others must not wait for it."""
        for barrier, _ in self.meetings.values():
            barrier.abort()


def _nothing() -> None:
    """The end of what has ended where it began."""


class ThreadComm(Comm):
    """``Comm`` without torch.distributed."""

    def __init__(self, wires: Wires, rank: int, axes: Mapping[str, Sequence[int]]) -> None:
        super().__init__(rank, axes, {})
        self._wires = wires

    def _meet(self, axis: str, value: Tensor, read: Callable[..., Tensor]) -> Tensor:
        return self._wires.exchange(axis, list(self._axes[axis]), self._rank, value, read)

    def all_reduce_(self, x: Tensor, axis: str, op: str) -> Tensor:
        assert x.is_contiguous() and op in ("sum", "max")
        fold = torch.sum if op == "sum" else torch.amax
        return x.copy_(self._meet(axis, x, lambda parts: fold(torch.stack(parts), 0)))

    def all_gather(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
        assert size == len(self._axes[axis])
        return self._meet(axis, x, lambda parts: _join(torch.stack(parts), dim, outer, copy=False))

    def reduce_scatter(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Tensor:
        mine = self.index(axis)
        return self._meet(axis, x, lambda parts: torch.stack([_parts(p, size, dim, outer)[mine] for p in parts]).sum(0))

    def reduce_scatter_(self, x: Tensor, axis: str) -> Tensor:
        return self._mine(x, axis).copy_(self.reduce_scatter(x, axis, len(self._axes[axis]), 0, 1))

    def all_gather_(self, x: Tensor, axis: str) -> Tensor:
        return x.copy_(self.all_gather(self._mine(x, axis), axis, len(self._axes[axis]), 0, 1))

    def begin_all_reduce_(self, x: Tensor, axis: str, op: str) -> Begun:
        return Begun(self.all_reduce_(x, axis, op), _nothing)

    def begin_all_gather(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Begun:
        return Begun(self.all_gather(x, axis, size, dim, outer), _nothing)

    def begin_reduce_scatter(self, x: Tensor, axis: str, size: int, dim: int, outer: int) -> Begun:
        return Begun(self.reduce_scatter(x, axis, size, dim, outer), _nothing)

    def all_to_all(self, x: Tensor, axis: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
        mine = self.index(axis)

        def read(parts: list[Tensor]) -> Tensor:
            return _join(torch.stack([_parts(p, size, split_dim, 1)[mine] for p in parts]), concat_dim, 1, copy=False)

        return self._meet(axis, x, read)


class ThreadExecutor(executor.RankExecutor):
    """The real executor, its sends and receives over queues."""

    wires: Wires

    def _connected(self) -> Any:
        """Queues need no connection."""

    def _expect(self, link: str, chunk: Any, meta: Any) -> None:
        assert len(self.expected[link]) < self.spec["window"]
        shape, dtype = meta
        buffer = torch.full(shape, torch.nan, dtype=getattr(torch, dtype))
        self.expected[link].append((chunk.links[link], buffer))  # type: ignore[arg-type]

    def _receive(self, link: str, part: tuple[int, int]) -> Tensor:
        (name, pieces), tensor = self.expected[link].popleft()
        for source, first, last in pieces:
            piece = self.wires.wire(source, self.rank, name).get(timeout=TIMEOUT_S)
            assert (piece.numel(), piece.dtype) == (last - first, tensor.dtype), (link, part)
            tensor.view(-1)[first:last] = piece.view(-1)
        return tensor

    def _send(self, link: str, tensor: Tensor, part: tuple[int, int]) -> None:
        name, pieces = self.chunks[part[1]].links[link]
        for target, first, last in pieces:
            self.wires.wire(self.rank, target, name).put(tensor.contiguous().view(-1)[first:last].clone())

    def _wait(self, link: str, most: int) -> None:
        """What was put has arrived."""


class ThreadRanks:
    """Stands in for ``autopar.ranks.LocalRanks``."""

    def __init__(self, cluster: Any) -> None:
        self.threads = ThreadPoolExecutor(cluster.num_devices)
        self.hosted = range(cluster.num_devices)
        self.wires = Wires()
        self.executors: list[ThreadExecutor] = []

    def load(self, payloads: Mapping[int, Any]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(held, "make_groups", _groups)
            patch.setattr(held, "Comm", lambda rank, axes, groups: ThreadComm(self.wires, rank, axes))
            self.executors = [ThreadExecutor(rank, 1, copy.deepcopy(payloads[rank])) for rank in self.hosted]
        for each in self.executors:
            each.wires = self.wires

    def call(self, method: str, payloads: Mapping[int, Any]) -> list[Any]:
        def run(each: ThreadExecutor) -> Any:
            try:
                return getattr(each, method)(payloads[each.rank])
            except BaseException:
                self.wires.abort()
                raise

        futures = [self.threads.submit(run, each) for each in self.executors]
        errors = [e for e in (f.exception() for f in futures) if e is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        results = [f.result() for f in futures]
        if method == "infer":
            loss = sum(result["loss"] for result in results)
            return [{**result, "loss": loss} for result in results]
        return [sum(results)] * len(results) if method in LOSSES else results

    def check_same(self, what: str, tensors: Mapping[str, Tensor], advice: str, among: int = 0) -> None:
        """There is one process."""

    def close(self) -> None:
        self.threads.shutdown()


def _groups(described: Mapping[str, list[list[int]]], rank: int) -> dict[str, tuple[list[int], None]]:
    """This rank's members of every group."""
    return {name: (ranks, None) for name, members in described.items() for ranks in members if rank in ranks}


@pytest.fixture
def thread_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executables of this test run their ranks as threads."""
    monkeypatch.setattr(autopar.ranks, "LocalRanks", ThreadRanks)
