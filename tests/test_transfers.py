"""Transfers between stages on real ranks, by reads of memory, by messages, and by both at once."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_targets import LINKS, PART

from autopar.runtime.near import Peer
from autopar.runtime.pool import WorkerPool

RANKS = 3
READERS = {"near": [[1, 2], [0, 2], [0, 1]], "messages": [[], [], []], "some": [[1], [0], []]}
"""Whose memory each rank reads, and by whom its own is read."""


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent))
        made = WorkerPool(RANKS, target="exchange_targets:Stages")
        made.call("__init__", [None] * RANKS)
        yield made
        made.close()


def asked(pool: WorkerPool, method: str, way: str) -> list[Any]:
    return pool.call(method, [{"others": others} for others in READERS[way]])


@pytest.mark.parametrize("way", READERS)
def test_links_carry_tensors_in_order_whichever_is_waited_for_first(pool: WorkerPool, way: str) -> None:
    """Every rank sends two tensors on each link to every other, in pieces of larger ones, and takes the links' last
    first."""
    for rank, found in enumerate(asked(pool, "exchanged", way)):
        for link, source, turn, value in found:
            assert torch.equal(value, torch.full((PART,), 100.0 * source + 10 * LINKS.index(link) + turn)), (rank, link)
        assert len(found) == (RANKS - 1) * len(LINKS) * 2


@pytest.mark.parametrize("way", ["near", "messages"])
def test_what_is_sent_stays_until_it_has_been_read(pool: WorkerPool, way: str) -> None:
    """The sender overwrites it as soon as it may, long before the receiver asks for it."""
    assert asked(pool, "overwritten", way)[1] == PART


def test_what_has_been_offered_is_read_without_waiting(pool: WorkerPool) -> None:
    """So that its sender may go on while the receiver computes."""
    assert asked(pool, "advanced", "near")[1] == (0.0, float(PART))


def test_ranks_that_cannot_be_read_are_sent_messages(pool: WorkerPool) -> None:
    """Where one side may not read, neither does the other."""
    assert pool.call("reached", [{"blind": 1}] * RANKS) == [[2], [], [0]]
    assert pool.call("reached", [{"blind": None}] * RANKS) == [[1, 2], [0, 2], [0, 1]]


def test_processes_with_many_open_files_hear_of_offers() -> None:
    """select.select knows file numbers below 1,024 only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 2048:
        pytest.skip("this process may not open as many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    here, there = socket.socketpair()
    try:
        with socket.socket(fileno=fcntl.fcntl(here, fcntl.F_DUPFD, 1500)) as places:
            own, other = Peer(0, 1, os.getpid(), places, places), Peer(1, 0, os.getpid(), there, there)
            assert places.fileno() >= 1500 and not own.has_offered(0)
            part = torch.zeros(1)
            other.offer(0, part)
            assert own.has_offered(0) and own.place(0) == part.data_ptr()
    finally:
        here.close()
        there.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
