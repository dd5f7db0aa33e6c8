"""Prices of collectives over one link speed, and their composition over the levels of a network.

Everywhere p ranks, S bytes of the full (gathered or reduced) tensor, a seconds of latency per message, B bytes per
second that each rank can send while all others send too. Formulas: Thakur, Rabenseifner, Gropp, "Optimization of
collective communication operations in MPICH", 2005; the ring as NCCL and gloo run it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cost_model.errors import UnknownNameError


@dataclass(frozen=True)
class Link:
    """latency_s: per message; bandwidth_bytes_per_s: one rank sending, all sending at once."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        assert self.latency_s >= 0 and self.bandwidth_bytes_per_s > 0

    def seconds(self, nbytes: float) -> float:
        """One message."""
        return self.latency_s + nbytes / self.bandwidth_bytes_per_s


def slowest(links: tuple[Link, ...]) -> Link:
    """The link that a ring over all of these moves at."""
    return Link(max(x.latency_s for x in links), min(x.bandwidth_bytes_per_s for x in links))


def ring_s(links: Sequence[Link], nbytes: float, rounds: int) -> float:
    """Seconds until everyone has the last of ``rounds`` messages of so many bytes, links[i] from rank i to the next.

    Everyone passes on what it received in the round before: a message leaves once it is there and the link is free,
    and keeps the link busy but for its latency. Over equal links: rounds x (latency + nbytes / bandwidth).
    """
    if len(set(links)) == 1:
        return rounds * links[0].seconds(nbytes)
    latency_s = np.array([link.latency_s for link in links])
    busy_s = nbytes / np.array([link.bandwidth_bytes_per_s for link in links])
    free = np.zeros(len(links))
    arrived = np.zeros(len(links))
    for _ in range(rounds):
        free = np.maximum(free, np.roll(arrived, 1)) + busy_s
        arrived = free + latency_s
    return float(arrived.max())


def all_reduce_s(ranks: int, nbytes: float, link: Link) -> float:
    """min of the ring, 2 (p - 1) (a + S / pB), and recursive doubling, ceil(log2 p) (a + S / B)."""
    ring = 2 * (ranks - 1) * link.seconds(nbytes / ranks)
    return min(ring, _rounds(ranks) * link.seconds(nbytes))


def all_gather_s(ranks: int, nbytes: float, link: Link) -> float:
    """min of the ring, (p - 1) (a + S / pB), and Bruck's, ceil(log2 p) a + S (2p - 1) / pB.

    Bruck's sends S (p - 1) / pB as well, and ends with a permutation of S bytes, taken to cost S / B.
    """
    ring = (ranks - 1) * link.seconds(nbytes / ranks)
    bruck = _rounds(ranks) * link.latency_s + nbytes * (2 - 1 / ranks) / link.bandwidth_bytes_per_s
    return min(ring, bruck)


def reduce_scatter_s(ranks: int, nbytes: float, link: Link) -> float:
    """The mirror of all_gather: ring, or recursive halving with the same permutation."""
    return all_gather_s(ranks, nbytes, link)


def all_to_all_s(ranks: int, nbytes: float, link: Link) -> float:
    """Pairwise exchange, (p - 1) (a + S / pB): S bytes are on each rank, of which it keeps S / p."""
    return (ranks - 1) * link.seconds(nbytes / ranks)


def broadcast_s(ranks: int, nbytes: float, link: Link) -> float:
    """min of the binomial tree, ceil(log2 p) (a + S / B), and pieces that pass down a chain, (p - 1) a + S / B.

    The chain is what NCCL does (its broadcast knows no other algorithm than the ring).
    """
    return min(tree_s(ranks, nbytes, link), chain_s((link,) * (ranks - 1), nbytes))


def tree_s(ranks: int, nbytes: float, link: Link) -> float:
    """A binomial tree, as gloo broadcasts: ceil(log2 p) (a + S / B)."""
    return _rounds(ranks) * link.seconds(nbytes)


def chain_s(links: Sequence[Link], nbytes: float) -> float:
    """Seconds until so many bytes have passed along all links in small pieces: the narrowest link's, and latencies."""
    return nbytes / min(x.bandwidth_bytes_per_s for x in links) + math.fsum(x.latency_s for x in links)


FLAT: dict[str, Callable[[int, float, Link], float]] = {
    "all_reduce": all_reduce_s,
    "all_gather": all_gather_s,
    "reduce_scatter": reduce_scatter_s,
    "all_to_all": all_to_all_s,
    "broadcast": broadcast_s,
}


@dataclass(frozen=True)
class Tier:
    """One level of a group that is regular: ``ranks`` subgroups meet over ``link``, each sending S / inner ranks."""

    ranks: int
    link: Link


def collective_s(kind: str, nbytes: float, tiers: tuple[Tier, ...]) -> float:
    """Seconds of a collective over a group whose tiers (innermost first) multiply to its size.

    min of the flat algorithm over the slowest link and the one that goes level by level. Errors: UnknownNameError.
    """
    if kind not in FLAT:
        raise UnknownNameError("collective", kind, FLAT)
    tiers = tuple(tier for tier in tiers if tier.ranks > 1)
    if not tiers:
        return 0.0
    flat = FLAT[kind](math.prod(t.ranks for t in tiers), nbytes, slowest(tuple(t.link for t in tiers)))
    return flat if len(tiers) == 1 else min(flat, _by_levels(kind, nbytes, tiers))


def _by_levels(kind: str, nbytes: float, tiers: tuple[Tier, ...]) -> float:
    """all_reduce: reduce_scatter inside, all_reduce of each share outside, all_gather inside; others in one pass."""
    inner, outer = tiers[0], tiers[1:]
    if kind == "all_reduce":
        inside = 2 * all_gather_s(inner.ranks, nbytes, inner.link)
        return inside + collective_s(kind, nbytes / inner.ranks, outer)
    if kind in ("all_gather", "reduce_scatter"):
        return FLAT[kind](inner.ranks, nbytes, inner.link) + collective_s(kind, nbytes / inner.ranks, outer)
    return FLAT[kind](inner.ranks, nbytes, inner.link) + collective_s(kind, nbytes, outer)


def _rounds(ranks: int) -> int:
    return (ranks - 1).bit_length()
