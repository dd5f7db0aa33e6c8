"""gloo's all_reduce, against what its messages do one by one and against packets of a real one."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cost_model import gloo_ring
from cost_model.collectives import Link, ring_s
from cost_model.gloo_ring import all_reduce_s

MIB = float(1 << 20)


class Member:
    """A rank of a ring in one round of it: asks for two segments, then for one whenever one has come."""

    def __init__(self, entered_s: float) -> None:
        self.posted, self.asked, self.sent, self.received = 0, 0, 0, 0
        self.free_s = self.done_s = entered_s


def round_by_events(links: list[Link], asking_s: list[float], busy_s: list[float], entered_s: list[float], count: int):
    """When each rank has received all; what two ranks send leaves them in the order in which it was given away."""
    ranks, size = [Member(s) for s in entered_s], len(links)
    events = [(s, 1, rank, "post") for rank, s in enumerate(entered_s) for _ in range(2)]
    heapq.heapify(events)
    while events:
        now, _, rank, what = heapq.heappop(events)
        own, before = ranks[rank], (rank - 1) % size
        if what == "come":
            own.received += 1
            own.done_s = now
            heapq.heappush(events, (now, 2, rank, "post"))
        elif what == "asked":
            own.asked += 1
        elif own.posted < count:
            own.posted += 1
            leaves_s = max(now, own.free_s) if size == 2 else now
            heapq.heappush(events, (leaves_s + asking_s[before], 0, before, "asked"))
        while own.sent < min(own.posted, own.asked):
            own.sent += 1
            own.free_s = max(now, own.free_s) + busy_s[rank]
            heapq.heappush(events, (own.free_s + links[rank].latency_s, 1, (rank + 1) % size, "come"))
    assert all(member.received == count for member in ranks)
    return [member.done_s for member in ranks]


LINKS = st.lists(
    st.builds(Link, st.sampled_from([0.01, 0.37, 2.9]), st.sampled_from([1.03 * MIB, 2.11 * MIB])),
    min_size=2,
    max_size=4,
)


@example([Link(0.01, 1.03 * MIB), Link(0.01, 2.11 * MIB)], 3.1, 5)
@example([Link(2.9, 1.03 * MIB), Link(0.37, 1.03 * MIB)], 3.1, 4)
@given(LINKS, st.sampled_from([0.011, 0.41, 3.1]), st.integers(2, 5))
def test_segments_one_by_one(links: list[Link], asking: float, each: int) -> None:
    ranks, asking_s = len(links), [asking * (1 + rank / 7) for rank in range(len(links))]
    busy_s = [MIB / link.bandwidth_bytes_per_s for link in links]
    ends = [0.0] * ranks
    for _ in range(2):
        ends = round_by_events(links, asking_s, busy_s, ends, each * (ranks - 1))
    found = all_reduce_s(tuple(links), tuple(asking_s), MIB * each * ranks)
    assert found == pytest.approx(max(ends), rel=0.02)


def test_by_hand() -> None:
    """Of two ranks each segment that takes longer than a delay waits for one, of more only the first and the last."""
    link = Link(0.1, MIB)
    assert all_reduce_s((link,) * 2, (0.1,) * 2, MIB * 5 * 2) == pytest.approx(2 * 5 * (1 + 0.1))
    assert all_reduce_s((link,) * 3, (0.1,) * 3, MIB * 5 * 3) == pytest.approx(2 * (5 * 2 + 2 * 0.1))
    assert all_reduce_s((link,) * 2, (0.1,) * 2, MIB) == pytest.approx(2 * (2 * 0.25 + 2 * 0.1))


def test_a_sum_of_one_element_goes_round_once_and_back() -> None:
    """Each rank is asked for it before it has it."""
    links = (Link(0.1, MIB),) * 3
    assert all_reduce_s(links, (0.1,) * 3, 8.0) == ring_s(links, 0.0, 4)


def test_what_packets_showed() -> None:
    """Two nodes, 200 Mbit/s, 5 ms and what messages take besides: 203 ms for the gradients of four layers of 512."""
    link = Link(0.0052, 25e6 * 7948 / 8080)
    assert all_reduce_s((link,) * 2, (0.0052,) * 2, 4 * 4.0 * (512 * 512 + 512)) == pytest.approx(0.203, rel=0.01)


def test_many_segments_take_what_the_first_ones_say(monkeypatch: pytest.MonkeyPatch) -> None:
    links, asking_s = (Link(0.005, 1e6), Link(0.02, 5e6), Link(0.001, 2e6)), (0.02, 0.005, 0.001)
    found = all_reduce_s(links, asking_s, 5e7)
    monkeypatch.setattr(gloo_ring, "_FOLLOWED", 1000)
    assert found == pytest.approx(all_reduce_s.__wrapped__(links, asking_s, 5e7), rel=1e-3)
