"""What the ranks of tests/test_exchange.py run; imported by them alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.comm import gather, scatter_sum


class Target:
    """Collectives over all ranks, and over all but the first."""

    def __init__(self, *, rank: int, world_size: int, payload: Any) -> None:
        others = dist.new_group(list(range(1, world_size)))
        self.groups = {"all": dist.group.WORLD, "others": others}
        self.rank = rank

    def gathered(self, request: dict[str, Any]) -> Tensor | None:
        """From parts ``in_place`` or apart; every element of a part is its rank's number."""
        group = self.groups[request["group"]]
        if not isinstance(group, dist.ProcessGroup):
            return None
        count, whole = request["count"], torch.full((group.size() * request["count"],), -1.0)
        part = whole.view(group.size(), -1)[group.rank()] if request["in_place"] else torch.empty(count)
        gather(whole, part.fill_(self.rank), group)
        return whole

    def summed(self, request: dict[str, Any]) -> Tensor | None:
        """This rank's part of the sum of rows that count upwards from the rank's number."""
        group = self.groups[request["group"]]
        if not isinstance(group, dist.ProcessGroup):
            return None
        row = torch.arange(group.size() * request["count"]) + float(self.rank)
        out = row.view(group.size(), -1)[group.rank()] if request["in_place"] else torch.empty(request["count"])
        scatter_sum(out, row, group)
        return out.clone()
