"""Real ranks that stay up between tests: workers start once for each number of ranks, programs are loaded anew.

To load a rank with another program takes some milliseconds; to start it five seconds of a core, or two tenths where it
is forked (``forked_ranks``). Tests of ending and losing ranks use ``autopar.ranks.LocalRanks`` itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

import autopar.ranks
from autopar.runtime.pool import WorkerPool

TARGET = "successive:SuccessiveExecutor"
KEPT = 4
"""Pools of more ranks end with their module."""
_POOLS: dict[int, WorkerPool] = {}


class SharedRanks:
    """Stands in for ``autopar.ranks.LocalRanks``."""

    def __init__(self, cluster: Any) -> None:
        size = cluster.num_devices
        if size not in _POOLS or _POOLS[size].closed:
            _POOLS[size] = WorkerPool(size, target=TARGET, backend=cluster.backend)
        self.pool = _POOLS[size]
        self.hosted: Sequence[int] = range(size)

    def load(self, payloads: Mapping[int, Any]) -> None:
        self.pool.call("__init__", [payloads[rank] for rank in self.hosted])

    def call(self, method: str, payloads: Mapping[int, Any]) -> list[Any]:
        return self.pool.call(method, [payloads[rank] for rank in self.hosted])

    def check_same(self, what: str, tensors: Mapping[str, Tensor], advice: str, among: int = 0) -> None:
        """There is one process."""

    def close(self) -> None:
        """The workers stay for the next test."""


@pytest.fixture(scope="module")
def shared_ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Executables of this module's tests share workers, with those of other modules too while they are few."""
    request.session.addfinalizer(end_ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autopar.ranks, "LocalRanks", SharedRanks)
        yield
    end_ranks(more_than=KEPT)


@pytest.fixture
def fresh_ranks(shared_ranks: None) -> Iterator[None]:
    """As ``shared_ranks``, on workers that no other test has used or will use."""
    end_ranks()
    yield
    end_ranks()


def end_ranks(more_than: int = 0) -> None:
    """The next program on so many ranks starts workers of its own."""
    for size in [size for size in _POOLS if size > more_than]:
        _POOLS.pop(size).close()
