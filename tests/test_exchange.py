"""Collectives made of sends and receives, or of reads of each other's memory, on real ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autopar.runtime.exchange import Messages
from autopar.runtime.pool import WorkerPool
from cost_model.errors import CollectiveTimeoutError, LostRankError

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


class Message:
    """One that arrives, or does not, for the reason given."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    def wait(self, timeout: timedelta) -> None:
        if self.reason is not None:
            raise RuntimeError(self.reason)


@pytest.mark.parametrize("collective", ["gather", "scatter"])
@pytest.mark.parametrize(
    ("reason", "error"),
    [("Timed out waiting 6000ms for recv operation", CollectiveTimeoutError), ("reset by peer", LostRankError)],
)
def test_the_rank_whose_message_does_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, collective: str, reason: str, error: type[Exception]
) -> None:
    """The second of ranks 4, 6 and 9 waits for each of the others, of which one is cut off."""
    backend = SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(seconds=6)))
    group: Any = SimpleNamespace(size=lambda: 3, rank=lambda: 1, _get_backend=lambda device: backend)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, place: (4, 6, 9)[place])
    for place, peer in ((0, 4), (2, 9)):

        def posted(part: torch.Tensor, cut: int = place, **given: Any) -> Message:
            return Message(reason if cut in (given.get("group_src"), given.get("group_dst")) else None)

        for name in ("irecv", "isend"):
            monkeypatch.setattr(dist, name, posted)
        begun: dict[str, Callable[[], Callable[[], None]]] = {
            "gather": lambda: Messages(group).begin_gather(torch.zeros(6), torch.zeros(2)),
            "scatter": lambda: Messages(group).begin_scatter(torch.zeros(2), torch.zeros(6), torch.zeros(4)),
        }
        with pytest.raises(error) as caught:
            begun[collective]()()
        assert (caught.value.rank, caught.value.peer) == (6, peer)  # type: ignore[attr-defined]
