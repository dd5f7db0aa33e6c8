"""Real ranks that stay up between tests: workers start once for each number of ranks, programs are loaded anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

import autopar.ranks
from autopar.runtime.pool import WorkerPool

_POOLS: dict[int, WorkerPool] = {}


class SharedRanks:
    """Stands in for ``autopar.ranks.LocalRanks``."""

    def __init__(self, cluster: Any) -> None:
        size = cluster.num_devices
        if size not in _POOLS or _POOLS[size].closed:
            _POOLS[size] = WorkerPool(size, backend=cluster.backend)
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
def shared_ranks() -> Iterator[None]:
    """Executables of this module's tests share their workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autopar.ranks, "LocalRanks", SharedRanks)
        yield
    end_ranks()


def end_ranks() -> None:
    """The next program starts ranks of its own."""
    while _POOLS:
        _POOLS.popitem()[1].close()
