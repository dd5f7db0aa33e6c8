"""Tables of the chain on the meshes that stages may have, each made once for all pools that are priced alike."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.planner.arrangements import Seat
from autopar.planner.chain import Chain
from autopar.planner.columns import RangeTable
from autopar.planner.mesh_chains import Key, MeshChains
from autopar.planner.segment import Price


class MeshTables:
    """Of some chains, at the prices of one search."""

    def __init__(self, chains: MeshChains) -> None:
        self.chains = chains
        self._tables: dict[Key, RangeTable] = {}
        self._saving: dict[Key, list[RangeTable]] = {}

    def table(self, seat: Seat, samples: int, prices: Sequence[Price]) -> RangeTable:
        """Of the chain that does nothing to save memory, with plans at these prices."""
        key = self.chains.key(seat, samples)
        if key not in self._tables:
            chain = self.chains.chain(seat, samples)
            assert chain is not None
            self._tables[key] = self._of(chain)
        self._tables[key].add(prices)
        return self._tables[key]

    def saving(self, seat: Seat, samples: int, prices: Sequence[Price]) -> list[RangeTable]:
        """Of the chains with ways to save memory."""
        key = self.chains.key(seat, samples)
        if key not in self._saving:
            self._saving[key] = [self._of(chain) for chain in self.chains.saving(seat, samples)]
        for table in self._saving[key]:
            table.add(prices)
        return self._saving[key]

    def _of(self, chain: Chain) -> RangeTable:
        return RangeTable(chain, self.chains.known(chain))
