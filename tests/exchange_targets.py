"""What the ranks of tests/test_exchange.py and tests/test_transfers.py run."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime import near
from autopar.runtime.exchange import Exchange, Messages
from autopar.runtime.near import connect, reach
from autopar.runtime.transfers import Transfers


class Target:
    """Collectives over all ranks, and over all but the first."""

    def __init__(self, *, rank: int, world_size: int, payload: Any) -> None:
        others = dist.new_group(list(range(1, world_size)))
        self.groups = {"all": dist.group.WORLD, "others": others}
        self.rank = rank
        self.ways: dict[tuple[str, str], Exchange] = {}
        for name, group in self.groups.items():
            if isinstance(group, dist.ProcessGroup):
                way = connect(group, timedelta(seconds=60))
                assert way is not None, "ranks of one machine"
                self.ways |= {("messages", name): Messages(group), ("near", name): way}

    def _way(self, request: dict[str, Any]) -> Exchange | None:
        return self.ways.get((request["way"], request["group"]))

    def gathered(self, request: dict[str, Any]) -> Tensor | None:
        """From parts ``in_place`` or apart; every element of a part is its rank's number."""
        group, way = self.groups[request["group"]], self._way(request)
        if not isinstance(group, dist.ProcessGroup) or way is None:
            return None
        count, whole = request["count"], torch.full((group.size() * request["count"],), -1.0)
        part = whole.view(group.size(), -1)[group.rank()] if request["in_place"] else torch.empty(count)
        way.begin_gather(whole, part.fill_(self.rank))()
        way.settle()
        return whole

    def summed(self, request: dict[str, Any]) -> Tensor | None:
        """This rank's part of the sum of rows that count upwards from the rank's number."""
        group, way = self.groups[request["group"]], self._way(request)
        if not isinstance(group, dist.ProcessGroup) or way is None:
            return None
        row = torch.arange(group.size() * request["count"]) + float(self.rank)
        out = row.view(group.size(), -1)[group.rank()] if request["in_place"] else torch.empty(request["count"])
        way.begin_scatter(out, row, torch.empty(row.numel() - out.numel()))()
        return out.clone()

    def reduced(self, request: dict[str, Any]) -> Tensor | None:
        """The sum, or the largest, of rows that count upwards from the rank's number."""
        way = self._way(request)
        if way is None:
            return None
        row = torch.arange(request["count"], dtype=getattr(torch, request["dtype"])) + self.rank
        way.begin_all_reduce(row, request["op"])()
        return row

    def at_once(self, request: dict[str, Any]) -> list[Tensor]:
        """A gather, a reduction and a sum that have all begun before a gather ends and they end, in ``order``."""
        way, count = self.ways[request["way"], "all"], request["count"]
        size = len(request["order"])
        whole, part = torch.empty(size * count), torch.full((count,), float(self.rank))
        row, arriving = torch.full((size * count,), float(self.rank)), torch.empty((size - 1) * count)
        total, between = torch.full((count,), float(self.rank)), torch.empty(size * count)
        ends = [
            way.begin_gather(whole, part),
            way.begin_scatter(arriving[:count], row, arriving),
            way.begin_all_reduce(total, "sum"),
        ]
        way.gather(between, part)
        for place in request["order"]:
            ends[place]()
        way.settle()
        return [whole, arriving[:count].clone(), total, between]


LINKS = ("forward", "backward")
PART = 1000


class Stages:
    """Transfers between all ranks, of which those in a request's ``others`` read each other's memory."""

    def __init__(self, *, rank: int, world_size: int, payload: Any) -> None:
        self.rank, self.size = rank, world_size
        self.groups = {link: dist.new_group(list(range(world_size))) for link in LINKS}

    def _transfers(self, others: list[int]) -> Transfers:
        world = dist.group.WORLD
        assert world is not None
        return Transfers(self.groups, reach(world, others, timedelta(seconds=60)))

    def exchanged(self, request: dict[str, Any]) -> list[tuple[str, int, int, Tensor]]:
        """(link, source, turn, what came) of two tensors from each other rank on each link."""
        transfers, others = self._transfers(request["others"]), [k for k in range(self.size) if k != self.rank]
        keys = [(link, other, turn) for link in LINKS for other in others for turn in range(2)]
        into = {key: torch.empty(PART) for key in keys}
        arriving = {key: transfers.receive(key[0], into[key], key[1]) for key in keys}
        leaving = []
        for place, link in enumerate(LINKS):
            rows = torch.arange(2.0)[:, None].expand(2, PART) + 100 * self.rank + 10 * place
            leaving += [transfers.send(link, row, k) for k in others for row in rows.clone()]
        for link, other, turn in sorted(keys, key=lambda key: (LINKS.index(key[0]), key[2])):
            arriving[link, other, turn].wait(None)
        for transfer in leaving:
            transfer.wait(None)
        transfers.close()
        return [(*key, value) for key, value in into.items()]

    def overwritten(self, request: dict[str, Any]) -> float | None:
        """What rank 1 has of the ones that rank 0 sent and then made zero."""
        transfers, row = self._transfers(request["others"]), torch.ones(PART)
        if self.rank == 0:
            transfers.send("forward", row, 1).wait(None)
            row.zero_()
        if self.rank == 1:
            time.sleep(0.2)
            transfers.receive("forward", row.zero_(), 0).wait(None)
        dist.barrier()
        transfers.close()
        return float(row.sum()) if self.rank == 1 else None

    def advanced(self, request: dict[str, Any]) -> tuple[float, float] | None:
        """What rank 1 has before and after rank 0 sends, though it does not wait; rank 0 goes on before it does."""
        transfers, row = self._transfers(request["others"]), torch.zeros(PART)
        arriving = transfers.receive("forward", row, 0) if self.rank == 1 else None
        found = []
        if arriving is not None:
            arriving.advance()
            found.append(float(row.sum()))
        dist.barrier()
        leaving = transfers.send("forward", torch.ones(PART), 1) if self.rank == 0 else None
        dist.barrier()
        if arriving is not None:
            arriving.advance()
            found.append(float(row.sum()))
        if leaving is not None:
            leaving.wait(None)
        dist.barrier()  # rank 1 comes here without having waited
        transfers.close()
        return (found[0], found[1]) if found else None

    def reached(self, request: dict[str, Any]) -> list[int]:
        """Whose memory this rank reads where the one called ``blind`` may read no other's."""
        world = dist.group.WORLD
        assert world is not None
        kept = near._process_vm_readv
        try:
            near._process_vm_readv = None if self.rank == request["blind"] else kept
            peers = reach(world, [k for k in range(self.size) if k != self.rank], timedelta(seconds=60))
        finally:
            near._process_vm_readv = kept
        for peer in peers.values():
            peer.close()
        return sorted(peers)
