"""Collectives made of sends and receives, or of reads of each other's memory, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autopar.runtime.pool import WorkerPool

RANKS = 3
WAYS = ("messages", "near")
MEMBERS = {"all": [0, 1, 2], "others": [1, 2]}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent))
        made = WorkerPool(RANKS, target="exchange_targets:Target")
        made.call("__init__", [None] * RANKS)
        yield made
        made.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", MEMBERS)
@pytest.mark.parametrize("count", [1, 1000, 200_000])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_rank_gathers_all_parts_in_order(
    pool: WorkerPool, way: str, group: str, count: int, in_place: bool
) -> None:
    found = pool.call("gathered", [{"way": way, "group": group, "count": count, "in_place": in_place}] * RANKS)
    expected = torch.tensor(MEMBERS[group], dtype=torch.float32).repeat_interleave(count)
    for rank in MEMBERS[group]:
        assert torch.equal(found[rank], expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", MEMBERS)
@pytest.mark.parametrize("count", [1, 1000, 200_000])
@pytest.mark.parametrize("in_place", [False, True])
def test_every_rank_has_its_part_of_the_sum(pool: WorkerPool, way: str, group: str, count: int, in_place: bool) -> None:
    members = MEMBERS[group]
    found = pool.call("summed", [{"way": way, "group": group, "count": count, "in_place": in_place}] * RANKS)
    whole = torch.arange(len(members) * count) * float(len(members)) + sum(members)
    for place, rank in enumerate(members):
        assert torch.equal(found[rank], whole.view(len(members), -1)[place])


@pytest.mark.parametrize("group", MEMBERS)
@pytest.mark.parametrize("count", [1, 3, 5_000, 200_001])
@pytest.mark.parametrize(("op", "dtype"), [("sum", "float32"), ("max", "float64"), ("sum", "bfloat16")])
def test_every_rank_has_the_same_reduction(pool: WorkerPool, group: str, count: int, op: str, dtype: str) -> None:
    requests = [{"way": way, "group": group, "count": count, "op": op, "dtype": dtype} for way in WAYS]
    messages, near = (pool.call("reduced", [request] * RANKS) for request in requests)
    for rank in MEMBERS[group]:
        assert torch.equal(near[rank], near[MEMBERS[group][0]])
        assert torch.allclose(near[rank].double(), messages[rank].double(), rtol=2e-2 if dtype == "bfloat16" else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [3, 100_000])
def test_collectives_that_have_begun_end_in_any_order(pool: WorkerPool, way: str, count: int) -> None:
    order = [2, 1, 0] if way == "near" else [0, 1, 2]  # messages between two ranks arrive in the order they were sent
    for whole, part, total, between in pool.call("at_once", [{"way": way, "count": count, "order": order}] * RANKS):
        for gathered in (whole, between):
            assert torch.equal(gathered, torch.arange(3.0).repeat_interleave(count))
        assert part.eq(3).all() and total.eq(3).all()
