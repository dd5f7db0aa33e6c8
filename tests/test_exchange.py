"""Collectives made of sends and receives, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autopar.runtime.pool import WorkerPool

RANKS = 3
MEMBERS = {"all": [0, 1, 2], "others": [1, 2]}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent))
        made = WorkerPool(RANKS, target="exchange_targets:Target")
        made.call("__init__", [None] * RANKS)
        yield made
        made.close()


@pytest.mark.parametrize("group", MEMBERS)
@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_rank_gathers_all_parts_in_order(pool: WorkerPool, group: str, count: int, in_place: bool) -> None:
    found = pool.call("gathered", [{"group": group, "count": count, "in_place": in_place}] * RANKS)
    expected = torch.tensor(MEMBERS[group], dtype=torch.float32).repeat_interleave(count)
    for rank in MEMBERS[group]:
        assert torch.equal(found[rank], expected)


@pytest.mark.parametrize("group", MEMBERS)
@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_rank_has_its_part_of_the_sum(pool: WorkerPool, group: str, count: int, in_place: bool) -> None:
    members = MEMBERS[group]
    found = pool.call("summed", [{"group": group, "count": count, "in_place": in_place}] * RANKS)
    whole = torch.arange(len(members) * count) * float(len(members)) + sum(members)
    for place, rank in enumerate(members):
        assert torch.equal(found[rank], whole.view(len(members), -1)[place])
