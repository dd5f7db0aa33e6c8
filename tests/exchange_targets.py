"""What the ranks of tests/test_exchange.py run; imported by them alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.exchange import Exchange, Messages
from autopar.runtime.near import connect


class Target:
    """Collectives over all ranks, and over all but the first."""

    def __init__(self, *, rank: int, world_size: int, payload: Any) -> None:
        others = dist.new_group(list(range(1, world_size)))
        self.groups = {"all": dist.group.WORLD, "others": others}
        self.rank = rank
        self.ways: dict[tuple[str, str], Exchange] = {}
        for name, group in self.groups.items():
            if isinstance(group, dist.ProcessGroup):
                near = connect(group, timedelta(seconds=60))
                assert near is not None, "ranks of one machine"
                self.ways |= {("messages", name): Messages(group), ("near", name): near}

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
        """A gather, a reduction and a sum that have all begun before the first of them is ended, in ``order``."""
        way, count = self.ways[request["way"], "all"], request["count"]
        size = len(request["order"])
        whole, part = torch.empty(size * count), torch.full((count,), float(self.rank))
        row, arriving = torch.full((size * count,), float(self.rank)), torch.empty((size - 1) * count)
        total = torch.full((count,), float(self.rank))
        ends = [
            way.begin_gather(whole, part),
            way.begin_scatter(arriving[:count], row, arriving),
            way.begin_all_reduce(total, "sum"),
        ]
        for place in request["order"]:
            ends[place]()
        way.settle()
        return [whole, arriving[:count].clone(), total]
