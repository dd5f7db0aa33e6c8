"""Process groups of one rank's program."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout as set_pg_timeout


def make_groups(described: Mapping[str, list[list[int]]], rank: int) -> dict[str, tuple[list[int], Any]]:
    """name -> (ranks, process group) of this rank; every rank makes every group, in the same order.

    "world" is the default group, which torch.distributed calls None, unless a placement reorders its ranks.
    """
    mine: dict[str, tuple[list[int], Any]] = {}
    for name, members in described.items():
        for ranks in members:
            is_default = name == "world" and ranks == sorted(ranks)
            group = _new_group(ranks) if len(ranks) > 1 and not is_default else None
            if rank in ranks:
                mine[name] = (ranks, group)
    return mine


def _new_group(ranks: list[int]) -> Any:
    """In the order given, which is that of the axis: a placement need not count upwards."""
    return dist.new_group(ranks) if ranks == sorted(ranks) else dist.new_group(ranks, sort_ranks=False)


def limit_waiting(groups: Sequence[Any], timeout_s: float | None) -> None:
    """Bound the collectives of the default group (None) and others, once everybody has joined them."""
    if timeout_s is not None and dist.is_initialized():
        for group in dict.fromkeys((None, *groups)):
            set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)
